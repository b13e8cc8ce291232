"""What no generated kernel computes, in whatever language it is printed."""

from __future__ import annotations

import functools

import torch

from attnopt.ir.spec import Spec
from attnopt.kernels.aten.linear import varies


@functools.lru_cache(maxsize=1024)
def reasons(spec: Spec) -> tuple[str, ...]:
    """What of a Spec stands in the way of every generated kernel; empty where nothing does."""
    found = []
    if spec.mix_logits or spec.mix_weights or spec.mix_bias:
        found.append("heads must not be mixed")
    if spec.dropout:
        found.append(f"dropout must be 0, got {spec.dropout}")
    if spec.compute and torch.promote_types(
            torch.float32, getattr(torch, spec.compute)) != torch.float32:
        found.append(f"compute must be float32 or less, got {spec.compute}")
    if spec.sinks is not None and "k" in varies(spec.sinks, spec):
        found.append("sinks must not vary along k")
    return tuple(found)
