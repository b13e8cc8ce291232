"""Spec -> C++ source, compiled with the system's compiler, without torch headers.

    reasons(spec)                why a Spec is not computed by generated C++; empty where it is
    Attention(spec, tile)        the function (query, key, value, operands) -> out, or None where
                                 these tensors are not for it
    prepare(signatures)          compile the kernels of a model in parallel

One template, `forward.h`, holds the loops; `template.py` puts the statements of the Spec into it.
"""

from __future__ import annotations

from attnopt.kernels.cpp.attention import Attention, prepare, reasons

__all__ = ["Attention", "prepare", "reasons"]
