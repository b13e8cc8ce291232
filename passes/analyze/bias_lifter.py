"""Lifting of biases that are no index arithmetic: constants stay loads, grids have coordinates.

`FloatLifter` gives up where nothing but values says what a tensor along queries and keys is.
`BiasLifter` leaves a load of such a tensor in the expression if it depends on no input or is small
(a table that a network makes), so that what is around it is still read. The passes that look at
values (`attnopt.passes.analyze.bias_tables`, `bias_regions`) take it then; what they leave is
refused with the whole operand.

`grid_layout` names the dimensions of an operand that follow a part of an axis: the rows and columns
of image tokens, q // W and q % W.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.passes.analyze.lift import Index, Layout, Lifted, Unliftable, hint
from attnopt.passes.analyze.lift_floats import FloatLifter
from attnopt.passes.analyze.relative_products import Product, product_at
from attnopt.passes.analyze.relative_tables import is_row_table
from attnopt.passes.analyze.sampled_bias import SampledTable, sampled_at
from attnopt.passes.analyze.structure import named_layout
from attnopt.passes.canonical import Canonical, Tensor
from attnopt.passes.recognize.axes import Axis, product, resolve, settle

_BOTH = frozenset("qk")


class BiasLifter(FloatLifter):
    """A FloatLifter that loads what is constant where it cannot be read, and tables of queries or
    keys by relative position."""

    wraps = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: tables that the program does not hold, by the name that loads them
        self.products: dict[str, Product] = {}
        self.samplings: dict[str, SampledTable] = {}

    def lift(self, node: fx.Node, indices: Index) -> Lifted:
        lifted = super().lift(node, indices)
        loads = dict(lifted.loads)
        for name in loads.keys() & self.products.keys():
            made = self.products[name]
            loads |= {n.name: n for n in (made.rows, made.table)}
        for name in loads.keys() & self.samplings.keys():
            loads |= self.samplings[name].loads
        return replace(lifted, loads=loads)

    def looked_up(self, table: fx.Node, places: Index) -> Expr:
        """One look-up at a place that is chosen, rather than a choice between look-ups."""
        if _BOTH <= frozenset().union(*(i.indices for i in places)) \
                and table.meta["val"].is_floating_point():
            try:
                found = self.element(table, places)
                if found.op == "load":
                    return found
            except Unliftable:
                pass
        return super().looked_up(table, places)

    def _element(self, node: fx.Node, idx: Index) -> Expr:
        try:
            return super()._element(node, idx)
        except Unliftable:
            along = frozenset().union(*(i.indices for i in idx))
            if _BOTH <= along and not node.meta.get("attnopt_opaque"):
                if is_row_table(self, node, idx):
                    return self.load(node, idx)
                made = product_at(self, node, idx)
                if made is None:
                    made = sampled_at(self, node, idx)
                if made is not None:
                    return made
            if not _BOTH <= along or any(
                    isinstance(n, torch.SymInt) for n in node.meta["val"].shape):
                raise
            if self.values.sources(node) is None and not self._small(node, along):
                raise
            return self.load(node, idx)

    def _small(self, node: fx.Node, along: frozenset[str]) -> bool:
        """Has the tensor fewer entries than there are scores that look at it?"""
        try:
            scores = math.prod(hint(self.axis_lengths[a]) for a in along)
        except (Unliftable, KeyError):
            return False
        return 2 * node.meta["val"].numel() <= scores


def grid_layout(canonical: Canonical, tensor: Tensor) -> tuple[Layout, dict[str, Any]] | None:
    """As `named_layout`, with int Exprs for dimensions that follow a part of an axis of known
    length."""
    plain = named_layout(canonical, tensor)
    if plain is not None:
        return plain
    whole = named_layout(canonical, Tensor(tensor.node, (), tensor.target))
    if whole is None:
        return None
    lengths = whole[1]
    target = dict(zip(lengths, map(resolve, tensor.target), strict=True))
    found: list[Any] = []
    for dim in settle(tensor.layout):
        name = next((n for n, parts in target.items() if dim and dim == settle((parts,))[0]), None)
        if name is not None:
            found.append(name)
            continue
        if not all(isinstance(a.size, int) for a in dim):
            return None
        total = E.const(0)
        for axis in dim:
            place = _place(axis, target)
            if place is None:
                return None
            total = total * axis.size + place
        found.append(total if dim else None)
    return tuple(found), lengths


def _place(axis: Axis, target: dict[str, tuple[Axis, ...]]) -> Expr | None:
    """The index along one axis in terms of the axis that it is a part of."""
    for name, parts in target.items():
        if axis in parts:
            at = parts.index(axis)
            inner = product(parts[at + 1 :])
            if not isinstance(inner, int):
                return None
            place = E.index(name) // inner
            return place if at == 0 else place % axis.size
    return None
