"""Deformable attention: a few sampled points per query instead of all keys.

    Sampling                 what to compute, with a text form
    deformable_attention     the op `attnopt::deformable_attention` on tensors
    reference                the same in float64, slow and plain: the oracle of the tests
"""

from attnopt.kernels.deformable.ops import deformable_attention
from attnopt.kernels.deformable.reference import reference
from attnopt.kernels.deformable.sampling import Sampling

__all__ = ["Sampling", "deformable_attention", "reference"]
