"""Operands of a computed expression: what it loads, brought to the axes of the scores.

A load whose indices are whole axes, or row-major products of them, becomes a broadcast operand (the
slopes of heads, the positions of keys); any other is a table with its indices.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.spec import Operand, leading_axes
from attnopt.passes.analyze.lift import Index, Lifter
from attnopt.passes.canonical import Canonical, Tensor
from attnopt.passes.recognize.axes import Axis, resolve


@dataclass
class Operands:
    """New operands of a site, by slot; `bind` adds to them."""

    canonical: Canonical
    declared: dict[str, tuple[Operand, Tensor]] = field(default_factory=dict)
    #: loads that were lifted -> what the Spec says in their place
    bound: dict[Expr, Expr] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = (*leading_axes(len(self.canonical.result) - 2), "q", "k")
        self.scores = (*self.canonical.query.target[:-1], self.canonical.key.target[-2])

    def copy(self) -> Operands:
        return Operands(self.canonical, dict(self.declared), dict(self.bound))

    @property
    def described(self) -> tuple[Operand, ...]:
        return tuple(operand for operand, _ in self.declared.values())

    def bind(self, lifter: Lifter, e: Expr) -> Expr:
        """`e` with its loads as operands of the Spec."""
        def operand(n: Expr) -> Expr | None:
            if n.op == "load" and n not in self.bound:
                self.bound[n] = self._declare(lifter, n)
            return self.bound.get(n)
        return e.replace(operand)

    def new_slot(self) -> str:
        """A name that no operand has."""
        known = {*self.canonical.operands, *(o.slot for o in self.canonical.spec.operands)}
        return next(s for i in range(len(known) + len(self.declared) + 1)
                    if (s := f"in{i}") not in known and s not in self.declared)

    def of(self, slot: str) -> tuple[Operand, Tensor]:
        """A new operand, or one that the site had."""
        if slot in self.declared:
            return self.declared[slot]
        return self.canonical.spec.operand(slot), self.canonical.operands[slot]

    def _declare(self, lifter: Lifter, n: Expr) -> Expr:
        slot = self.new_slot()
        node = lifter.nodes[n.value]
        axes = self._axes(lifter, node, n.args)
        if axes is None:
            own = tuple((Axis(size),) for size in node.meta["val"].shape)
            self.declared[slot] = Operand(slot, None, n.dtype, "table"), Tensor(node, own, own)
            return E.load(slot, *n.args, dtype=n.dtype)
        place = dict(zip(self.names, map(resolve, self.scores), strict=True))
        layout = tuple(tuple(a for name in run for a in place[name]) for run in axes)
        along = tuple(a for a in self.names if any(a in run for run in axes))
        role = "bias" if n.dtype == E.FLOAT else "mask"
        self.declared[slot] = (Operand(slot, along, n.dtype, role),
                               Tensor(node, layout, self.scores))
        return E.load(slot, dtype=n.dtype)

    def _axes(self, lifter: Lifter, node: fx.Node, idx: Index) -> list[tuple[str, ...]] | None:
        """The score axes that every dimension of a load follows; None where one follows none."""
        logic, names = lifter.logic, self.names
        runs = [names[i:j] for i in range(len(names)) for j in range(i + 1, len(names) + 1)]
        found: list[tuple[str, ...]] = []
        for n, i in zip(node.meta["val"].shape, idx, strict=True):
            if n == 1:
                found.append(())
                continue
            run = next((r for r in runs if lifter.indices((r,))[0] is i and _length(lifter, n) is
                        logic.product([logic.lengths[a] for a in r])), None)
            if run is None:
                return None
            found.append(tuple(a for a in run if logic.lengths[a] is not E.const(1)))
        flat = [a for run in found for a in run]
        return found if len(set(flat)) == len(flat) else None


def _length(lifter: Lifter, n: int | torch.SymInt) -> Expr | None:
    try:
        return lifter.logic.of_size(n)
    except LookupError:
        return None
