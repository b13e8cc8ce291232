"""Operands of a computed expression: what it loads, brought to the axes of the scores.

A load whose indices are whole axes, or row-major products of them, becomes a broadcast operand (the
slopes of heads, the positions of keys); any other is a table with its indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.spec import Operand, leading_axes
from attnopt.kernels import block_maps
from attnopt.passes.analyze.block_tables import BlockTable
from attnopt.passes.analyze.lift import Index, Lifter, Unliftable
from attnopt.passes.analyze.lift_floats import FloatLifter
from attnopt.passes.canonical import Canonical, Recipe, Tensor
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
            elif n.op == "inner" and n not in self.bound:
                self.bound[n] = self._factors(lifter, n)
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
        if n.value in lifter.values.patterns.blocks:
            self.declare_blocks(n.value, lifter.values.patterns.blocks.by_slot[n.value])
            return n
        node = lifter.nodes[n.value]
        axes = self._axes(lifter, node.meta["val"].shape, n.args)
        if axes is None:
            for slot, (operand, tensor) in self.declared.items():
                if operand.axes is None and operand.dtype == n.dtype and tensor.node is node \
                        and tensor.recipe is None and tensor.layout == tensor.target:
                    return E.load(slot, *n.args, dtype=n.dtype)
        slot = self.new_slot()
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

    def declare_blocks(self, slot: str, table: BlockTable) -> None:
        """Bind a slot to a constant table of blocks, which the rewritten graph makes."""
        place = dict(zip(self.names, map(resolve, self.scores), strict=True))
        rows, keys = place["q"], place["k"]
        target = (place["h"], rows, keys) if table.heads else (rows, keys)
        kept = table.kept if table.heads else table.kept[0]
        recipe = Recipe(
            torch.ops.attnopt.block_map.default, (self.canonical.query,), (rows, keys),
            block_maps.table_text(kept, table.block_q, table.block_k), torch.bool,
            (*[1] * table.heads, table.block_q, table.block_k))
        self.declared[slot] = (Operand(slot, None, E.BOOL, "mask"),
                               Tensor(self.canonical.query.node, target, target, recipe))

    def _factors(self, lifter: Lifter, n: Expr) -> Expr:
        """A low-rank term with its factors (*L, Q, R) and (*L, K, R) as operands."""
        assert isinstance(lifter, FloatLifter)
        place = dict(zip(self.names, map(resolve, self.scores), strict=True))
        slots = []
        for name, own in zip(n.value, "qk", strict=True):
            node, idx = lifter.factors[name]
            at = idx.index(E.index("d"))
            shape = list(node.meta["val"].shape)
            columns = (Axis(shape.pop(at)),)
            axes = self._axes(lifter, shape, (*idx[:at], *idx[at + 1 :]))
            if axes is None or sum(own in run for run in axes) != 1:
                raise Unliftable(f"{node.name} does not follow the axes of the scores")
            layout = [tuple(a for axis in run for a in place[axis]) for run in axes]
            layout.insert(at, columns)
            target = (*self.scores[:-2], place[own], columns)
            slot = self.new_slot()
            along = tuple(a for a in self.names if any(a in run for run in axes))
            self.declared[slot] = (Operand(slot, along, E.FLOAT, "factor"),
                                   Tensor(node, tuple(layout), target))
            slots.append(slot)
        return E.inner(*slots)

    def rank(self, e: Expr) -> int:
        """Columns of the low-rank terms of an expression of operands."""
        return sum(self.declared[leaf.value[0]][1].target[-1][0].size
                   for leaf in e.leaves if leaf.op == "inner")

    def _axes(self, lifter: Lifter, shape: Sequence[Any], idx: Index
              ) -> list[tuple[str, ...]] | None:
        """The score axes that every dimension of a load follows; None where one follows none."""
        logic, names = lifter.logic, self.names
        runs = [names[i:j] for i in range(len(names)) for j in range(i + 1, len(names) + 1)]
        found: list[tuple[str, ...]] = []
        for n, i in zip(shape, idx, strict=True):
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
