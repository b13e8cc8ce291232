"""Operands of a part of the scores: lifted within the part, then moved to where it lies.

A bias that is added to image tokens alone is read as if there were no others,

    f(q, k)        0 <= q < Q - s, 0 <= k < K - t

and stands in the logits as `where(q >= s and k >= t, f(q - s, k - t), 0)`, its indices kept inside
of the part, so that nothing is loaded that is not there. Tables that the rewritten graph makes from
the lengths of the scores would be those of the whole, so these are left as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.kernels import placed
from attnopt.passes.analyze.lift import Unliftable
from attnopt.passes.analyze.relative_tables import RowTable
from attnopt.passes.canonical import Tensor

_AXES = {-1: "k", -2: "q"}


@dataclass(frozen=True)
class Place:
    """Where an operand lies: the tensor along the part, and by axis of the scores the start of the
    part."""

    tensor: Tensor
    starts: Mapping[str, int]

    @staticmethod
    def of(operand: Tensor) -> Place | None:
        """None where an operand is along the whole scores."""
        recipe = operand.recipe
        if recipe is None or recipe.op is not torch.ops.attnopt.placed.default:
            return None
        return Place(recipe.inputs[0], {
            _AXES[dim]: start for dim, start in placed.starts_of(recipe.text).items()})

    def put(self, e: Expr, lives: Any, tables: Mapping[str, Any]) -> Expr:
        """An expression of the part as one of the scores. Raises Unliftable where it depends on the
        lengths of the part."""
        made = [t for t in tables.values() if not (
            isinstance(t, RowTable) and isinstance(t.source, fx.Node))]
        if lives or made or e.has("size"):
            raise Unliftable("a table of a part of the scores")
        if e.dtype != E.FLOAT:
            raise Unliftable("a mask of a part of the scores")
        moved = {E.index(a): E.call("maximum", E.index(a) - start, 0)
                 for a, start in self.starts.items() if start}
        inside = E.TRUE
        for axis, start in self.starts.items():
            inside = inside & (E.const(start) <= E.index(axis))
        return E.where(inside, e.replace(moved), 0.0)
