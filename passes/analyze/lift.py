"""Lift a tensor of the graph to an index function: its element at given indices, as an `Expr`.

`Lifter.lift(node, indices)` walks up from `node`, turning views and gathers into substitutions in
the indices and pointwise operations into expressions (`lift_rules`: one rule per op). What it
returns is exactly the value: float arithmetic is folded on constants in the author's own types,
whole numbers are used only where the type holds them, and anything that would round is not lifted.

The rule that makes it total: a node that cannot be lifted becomes a load of that node where its
index does not contain both q and k, so it is cut where the data is O(N), never where it is O(N^2).
Before that, a table that depends on no input is compared by value with a few index functions; the
buffers and constants that were read for it are the lift's guards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.passes.analyze import by_value, lift_tables
from attnopt.passes.analyze.by_value import Values
from attnopt.passes.analyze.logic import Logic
from attnopt.passes.normalize import op_name

Index = tuple[Expr, ...]
#: per dimension of a tensor: the score axis it follows, several for a row-major product of axes,
#: an int Expr, or None where its length is 1
Layout = tuple[str | Expr | tuple[str, ...] | None, ...]


class Unliftable(LookupError):
    """No index function was found; the message names the node and says why."""


@dataclass(frozen=True)
class Lifted:
    """`expr` is the element; `loads` gives the node behind each slot (a tensor, or a SymInt for a
    slot that is loaded without indices); `guards` are the placeholders whose values were used."""

    expr: Expr
    loads: Mapping[str, fx.Node]
    guards: frozenset[str]


@dataclass
class Bound:
    """Arguments of an op by the names in its schema, defaults filled in."""

    values: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return self.values[name]

    def get(self, name: str, default: Any = None) -> Any:
        found = self.values.get(name)
        return default if found is None else found


def bind(node: fx.Node) -> Bound:
    """The arguments of an ATen call by name."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return Bound({str(i): a for i, a in enumerate(node.args)})
    values: dict[str, Any] = {}
    for i, argument in enumerate(target._schema.arguments):
        if i < len(node.args) and not argument.kwarg_only:
            values[argument.name] = node.args[i]
        else:
            values[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return Bound(values)


def kind(dtype: torch.dtype) -> str:
    """The Expr type of a torch type."""
    if dtype.is_complex:
        raise Unliftable("complex numbers have no index function")
    return E.BOOL if dtype == torch.bool else E.FLOAT if dtype.is_floating_point else E.INT


class _SiteLogic(Logic):
    """Logic in which a size that is no axis of the site is a load of its SymInt node."""

    def __init__(self, lengths: Mapping[str, int | torch.SymInt], graph: fx.Graph,
                 nodes: dict[str, fx.Node]) -> None:
        self.graph, self.nodes = graph, nodes
        super().__init__(lengths)

    def of_sympy(self, e: sympy.Expr) -> Expr:
        if e.is_Symbol and e not in self.symbols:
            for node in self.graph.nodes:
                val = node.meta.get("val")
                if isinstance(val, torch.SymInt) and val.node.expr == e:
                    self.nodes[node.name] = node
                    return E.load(node.name, dtype=E.INT)
        return super().of_sympy(e)


class Lifter:
    """Lifts nodes of one functional graph for a site with the given axis lengths.

    kind_of:  placeholder name -> "input", "parameter", "buffer" or "constant"
    value_of: placeholder name -> its tensor, or None where it is not at hand
    lengths:  axis name (q, k, h, b …) -> int, or SymInt of the graph
    values:   shared between lifters of one graph, so that values are computed once
    """

    #: may a place that a view moves to the next row be a choice between two places?
    wraps = False

    def __init__(self, graph: fx.Graph, kind_of: Mapping[str, str],
                 value_of: Callable[[str], Tensor | None],
                 lengths: Mapping[str, int | torch.SymInt], values: Values | None = None) -> None:
        self.kind_of, self.axis_lengths = kind_of, lengths
        self.nodes: dict[str, fx.Node] = {}
        self.logic: Logic = _SiteLogic(lengths, graph, self.nodes)
        self.values = values or Values(kind_of, value_of)
        #: nodes, with indices, whose element each expression is; outer nodes after inner ones
        self.found_at: dict[Expr, dict[fx.Node, Index]] = {}
        self._memo: dict[tuple[fx.Node, Index], tuple[Expr | Unliftable, frozenset[str]]] = {}
        self._guards: set[str] = set()

    # -- entry ------------------------------------------------------------------------------
    def lift(self, node: fx.Node, indices: Index) -> Lifted:
        """The element of `node` at `indices`, one per dimension.

        Raises Unliftable.
        """
        rank = node.meta["val"].dim()
        if len(indices) != rank:
            raise ValueError(f"indices must be {rank}, got {len(indices)}")
        self._guards, self.logic.work = set(), 0
        e = self.element(node, indices)
        used = {slot: self.nodes[slot] for slot in e.slots if slot not in self.values.patterns
                and slot not in self.values.patterns.blocks}
        return Lifted(e, used, frozenset(self._guards))

    def by_value(self, node: fx.Node, indices: Index) -> Lifted:
        """The element of a node that depends on no input, by its values alone.

        Raises Unliftable.
        """
        sources = self.values.sources(node)
        found = None if sources is None else self._by_value(node, indices)
        if found is None or sources is None:
            raise Unliftable(f"{node.name}: its values have no form")
        return Lifted(found, {}, sources)

    def indices(self, layout: Layout) -> Index:
        """The indices of a tensor whose dimensions follow the given score axes."""
        return tuple(map(self._along, layout))

    def _along(self, axis: str | Expr | tuple[str, ...] | None) -> Expr:
        if isinstance(axis, Expr):
            return axis
        total = E.const(0)
        for name in (axis,) if isinstance(axis, str) else axis or ():
            length = self.logic.lengths[name]
            place = E.const(0) if length is E.const(1) else E.index(name)
            total = self.logic.add(self.logic.mul(total, length), place)
        return total

    # -- recursion, used by the rules -------------------------------------------------------
    def element(self, node: fx.Node, idx: Index) -> Expr:
        """The element of a tensor node. Raises Unliftable."""
        idx = tuple(E.const(0) if _is_one(n) else i
                    for n, i in zip(node.meta["val"].shape, idx, strict=True))
        key = (node, idx)
        if key not in self._memo:
            outer, self._guards = self._guards, set()
            try:
                e = self._element(node, idx)
                result: Expr | Unliftable = e
                if _axes(idx) <= e.indices:
                    self.found_at.setdefault(e, {})[node] = idx
            except Unliftable as why:
                result = why
            except RecursionError:
                result = Unliftable(f"{node.name}: nested too deeply")
            self._memo[key] = result, frozenset(self._guards)
            self._guards = outer
        result, guards = self._memo[key]
        if isinstance(result, Unliftable):
            raise Unliftable(*result.args)
        self._guards |= guards
        return result

    def _element(self, node: fx.Node, idx: Index) -> Expr:
        from attnopt.passes.analyze.lift_rules import RULES, fold_pointwise

        if node.meta.get("attnopt_opaque"):
            raise Unliftable(f"{node.name}: its memory may be shared in an unknown way")
        if node.op == "placeholder":
            return self._placeholder(node, idx)
        try:
            if node.op != "call_function":
                raise Unliftable("not an operation")
            rule = RULES.get(op_name(node), fold_pointwise)
            return rule(self, node, bind(node), idx)
        except LookupError as why:
            self._guards = set()
            found = self._by_value(node, idx)
            if found is not None:
                return found
            axes = _axes(idx)
            if "q" in axes and "k" in axes:
                reason = str(why) if isinstance(why, Unliftable) and ":" in str(why) \
                    else f"{node.name}: {why}"
                raise Unliftable(reason) from None
            return self.load(node, idx)

    def _placeholder(self, node: fx.Node, idx: Index) -> Expr:
        if self.values.sources(node) is not None:
            found = self._by_value(node, idx)
            if found is not None:
                return found
        return self.load(node, idx)

    def _by_value(self, node: fx.Node, idx: Index) -> Expr | None:
        """An index function that equals the values of an input-free node."""
        sources = self.values.sources(node)
        if sources is None or any(isinstance(n, torch.SymInt) for n in node.meta["val"].shape):
            return None
        try:
            table = self.values.evaluate(node)
            found = by_value.fit(table, idx, self.logic)
            if found is None:
                found = self._named_table(table, idx)
        except LookupError:
            return None
        if found is not None:
            self._guards |= sources
        return found

    def _named_table(self, table: Tensor, idx: Index) -> Expr | None:
        """A constant table of two values by the mask that splits it, which is one literal."""
        return lift_tables.fit(self.values.patterns, table, idx, self.logic.lengths)

    def load(self, node: fx.Node, idx: Index) -> Expr:
        """A load of the node's own tensor."""
        self.nodes[node.name] = node
        return E.load(node.name, *idx, dtype=kind(node.meta["val"].dtype))

    def looked_up(self, table: fx.Node, places: Index) -> Expr:
        """The element of a table at places that may be case trees."""
        return self.logic.spread(lambda *at: self.element(table, at), *places)

    def operand(self, x: Any, idx: Index) -> Expr:
        """The element of an argument that is broadcast to the result: a tensor, a size, a number.
        """
        if not isinstance(x, fx.Node):
            return E.wrap(self.number(x))
        val = x.meta.get("val")
        if isinstance(val, Tensor):
            return self.element(x, idx[len(idx) - val.dim() :])
        return self.number(x)

    def number(self, x: Any) -> Expr:
        """A scalar argument: a Python number, a SymInt or its node."""
        if isinstance(x, fx.Node):
            x = x.meta.get("val")
        if isinstance(x, torch.SymInt):
            return self.size(x)
        if isinstance(x, bool | int | float):
            return E.const(x + 0.0 if isinstance(x, float) else x)
        raise Unliftable(f"a number must be an int, a float or a size, got {type(x).__name__}")

    def size(self, x: Any) -> Expr:
        """A length or position, as an int Expr."""
        if isinstance(x, fx.Node):
            x = x.meta.get("val")
        try:
            return self.logic.of_size(x)
        except LookupError as why:
            raise Unliftable(str(why)) from None

    def shape(self, node: fx.Node) -> list[Expr]:
        """The lengths of a tensor node."""
        return [self.size(n) for n in node.meta["val"].shape]


def hint(x: Any) -> int:
    """The number that a size had when the graph was captured. The capture checks every call for
    the decisions that it took with it (is this slice's start negative, beyond the end, …)."""
    if isinstance(x, fx.Node):
        x = x.meta.get("val")
    if isinstance(x, torch.SymInt):
        found = x.node.hint
        if found is None:
            raise Unliftable(f"size {x} depends on data")
        return int(found)
    if isinstance(x, bool) or not isinstance(x, int):
        raise Unliftable(f"a position must be an int, got {x!r}")
    return x


def _is_one(n: int | torch.SymInt) -> bool:
    """Is a length 1? One that depends on data is asked for no number."""
    return not (isinstance(n, torch.SymInt) and n.node.hint is None) and bool(n == 1)


def _axes(idx: Index) -> frozenset[str]:
    return frozenset().union(*(i.indices for i in idx))
