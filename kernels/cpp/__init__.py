"""Spec -> C++ source, compiled with the system's compiler, without torch headers.

    reasons(spec, …)             why generated C++ does not compute a Spec; empty where it does
    Attention(spec, tile)        the function (query, key, value, operands) -> out, or None where
                                 these tensors are not for it
    Training(attention)          the same under autograd; training_reasons(spec, operands)
    prepare(calls)               compile the kernels of a model in parallel

`forward.h` and `backward.h` hold the loops; `template.py` and `template_backward.py` put the
statements of a Spec into them.
"""

from __future__ import annotations

from attnopt.kernels.cpp.attention import Attention, prepare, reasons, spec_reasons
from attnopt.kernels.cpp.training import Training, training_reasons

__all__ = ["Attention", "Training", "prepare", "reasons", "spec_reasons", "training_reasons"]
