"""Why generated Triton does not compute a Spec, for the report; nothing here imports triton."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

import torch

from attnopt.ir.spec import Spec
from attnopt.kernels import printable
from attnopt.kernels.triton import backward
from attnopt.kernels.triton.tiles import widest

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def available() -> bool:
    """Whether triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in triton's interpreter, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def reasons(spec: Spec, dtypes: Sequence[torch.dtype] = (), device: str = "cuda", *,
            head_dims: tuple[Any, Any] = (1, 1), requires_grad: bool = False,
            grads_of: Sequence[str] = ()) -> list[str]:
    """Why Triton kernels do not compute `spec` for such a call; empty where they do.

    dtypes: of query, key and value; head_dims: D and Dv, ints or symbolic; requires_grad: of query,
    key or value; grads_of: operands whose gradient is asked for, too
    """
    found = list(of_spec(spec))
    if len(set(dtypes)) > 1 or any(d not in DTYPES for d in dtypes):
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        found.append(
            f"query, key and value must be float16, bfloat16 or float32 alike, got {names}")
    most = widest(max((d.itemsize for d in dtypes), default=2), requires_grad or bool(grads_of))
    if any(isinstance(d, int) and not 1 <= d <= most for d in head_dims):
        found.append(f"head_dims must be in [1, {most}], got {head_dims[0]} and {head_dims[1]}")
    if device != "cuda" and not interpreted():
        found.append(f"device must be cuda, got {device}")
    if not available():
        found.append("triton is not installed")
    if requires_grad or grads_of:
        found += backward.reasons(spec)
        if backward.kinds(spec, frozenset(grads_of), ()) is None:
            found.append("the gradient is not made for " + ", ".join(sorted(grads_of)))
    return found


@functools.lru_cache(maxsize=1024)
def of_spec(spec: Spec) -> tuple[str, ...]:
    """What stands in the way whatever the call."""
    found = list(printable.reasons(spec))
    exprs = [e for e in (spec.logits, spec.mask.predicate(), spec.weights, spec.output,
                         spec.groups, spec.sinks) if e is not None]
    leaves = {leaf for e in exprs for leaf in e.leaves}
    masses = [x.value for x in leaves if x.op == "stat" and x.value.startswith("mass:")]
    if masses and spec.groups is None or any(not re.fullmatch(r"mass:-?\d+", m) for m in masses):
        found.append("groups must be numbers")
    if any(m.startswith("mass:-") for m in masses):
        found.append("groups must not be negative")
    for operand in spec.operands:
        ways = {"factor" if x.op == "inner" else bool(x.args) for x in leaves
                if x.op in ("load", "inner") and operand.slot in
                (x.value if x.op == "inner" else (x.value,))}
        if len(ways) > 1 or ways and (operand.axes is None) != (ways == {True}):
            found.append(f"operand {operand.slot!r} must be either gathered or broadcast")
    for leaf in leaves:
        if leaf.op == "inner" and {"k"} & set(spec.operand(leaf.value[0]).axes or ()) or (
                leaf.op == "inner" and {"q"} & set(spec.operand(leaf.value[1]).axes or ())):
            found.append("the factors of a low-rank term must vary along q and along k")
    inners = {leaf for e in (spec.logits, spec.weights) for leaf in e.leaves if leaf.op == "inner"}
    if any(leaf.op == "inner" and leaf not in inners for leaf in leaves):
        found.append("a low-rank term must be part of the logits or of the weights")
    return tuple(found)

