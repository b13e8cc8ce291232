"""By which lowering the op computes tensors, as far as dtypes and device say."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attnopt.kernels.cpp.toolchain import toolchain
from attnopt.kernels.deformable.gather import ELEMENTS
from attnopt.kernels.triton.declines import DTYPES, available, interpreted


def lowering(dtypes: Sequence[torch.dtype], device: str) -> str:
    """"triton", "cpp" or "aten", for the dtypes of value, locations and weights."""
    if (device == "cuda" or interpreted()) and available() and all(d in DTYPES for d in dtypes):
        return "triton"
    if device == "cpu" and all(d in ELEMENTS for d in dtypes) and not toolchain().why_not():
        return "cpp"
    return "aten"
