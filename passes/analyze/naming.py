"""Names of the score's axes for the dimensions of an operand: h, b, b1 … for what leads, q and k.

Recognition knows axes by identity; the lift and the algebra of masks know them by name.
"""

from __future__ import annotations

from typing import Any

import torch

from attnopt.ir.spec import leading_axes
from attnopt.passes.analyze.lift import Layout
from attnopt.passes.canonical import Canonical, Tensor
from attnopt.passes.recognize.axes import length, product, resolve, settle


def named_layout(canonical: Canonical, tensor: Tensor) -> tuple[Layout, dict[str, Any]] | None:
    """The layout of an operand by names of score axes, and the lengths of all of them; None where
    a dimension or a length has no name, or the rewritten graph makes the operand."""
    if tensor.recipe is not None:
        return None
    names = (*leading_axes(len(canonical.result) - 2), "q", "k")
    target = [resolve(dim) for dim in tensor.target]
    known = _symbolic_lengths(canonical)
    lengths: dict[str, Any] = {}
    for name, dim in zip(names, target, strict=True):
        size = product(dim)
        if not isinstance(size, int) and size not in known:
            return None
        lengths[name] = size if isinstance(size, int) else known[size]
    layout: list[Any] = []
    for dim in settle(tensor.layout):
        entry = _named(dim, target, names)
        if entry is False:
            return None
        layout.append(entry)
    return tuple(layout), lengths


def _symbolic_lengths(canonical: Canonical) -> dict[Any, Any]:
    """Symbolic lengths that are a whole dimension of an operand or of an input, as torch has them.
    """
    given = [n for n in canonical.query.node.graph.nodes if n.op == "placeholder"]
    values = [n.meta.get("val") for n in (*given, *(t.node for t in canonical.tensors))]
    return {length(s): s for v in values if isinstance(v, torch.Tensor) for s in v.shape
            if isinstance(s, torch.SymInt)}


def _named(dim: tuple[Any, ...], target: list[tuple[Any, ...]], names: tuple[str, ...]) -> Any:
    """None for length 1, an axis name, or several for a row-major product; False if cut."""
    if not dim:
        return None
    found: list[str] = []
    rest = list(dim)
    while rest:
        for name, axes in zip(names, target, strict=True):
            if axes and tuple(rest[: len(axes)]) == axes:
                found.append(name)
                del rest[: len(axes)]
                break
        else:
            return False
    return found[0] if len(found) == 1 else tuple(found)
