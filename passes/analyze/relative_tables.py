"""Tables of queries or keys: T[b, h, q, f(q, k)] and T[b, h, k, f(q, k)], read where they are.

A term of the scores that depends on the query (or key) and on a relative position is a table of
queries x positions, of which every score reads one entry. Models move that entry to its place:

    Transformer-XL, conformers   zeros before, another view, a slice          f = k - q + N - 1
    XLNet, Music Transformer     the same with other lengths (arXiv 1906.08237, 1809.04281)
    DeBERTa v1, v2               a gather by clamped or logarithmic buckets    f = bucket(q - k)
    Shaw, BERT's relative_key    embeddings gathered before the product: `relative_products`

The lift of these moves is an index; what it loads is then neither queries x keys nor copied. An
index that is dear, rounds or is a table of its own (buckets) becomes a strip by distance as in
`bias_tables`, so that it is one more vector load.

An index is proven to lie within the table: a model that runs out of it fails, a kernel reads on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from attnopt.ir import expr as E
from attnopt.ir.evaluate import Env, evaluate
from attnopt.ir.expr import Expr
from attnopt.ir.lanes import motion
from attnopt.ir.spec import Operand, Spec
from attnopt.passes.analyze.lift import Index, Lifted, Unliftable
from attnopt.passes.analyze.lift_floats import decides
from attnopt.passes.analyze.logic import Logic
from attnopt.passes.analyze.relative_products import Product
from attnopt.passes.canonical import Tensor as Brought
from attnopt.passes.normalize import is_tensor
from attnopt.passes.recognize.axes import Axis

if TYPE_CHECKING:
    from attnopt.passes.analyze.bias_lifter import BiasLifter
    from attnopt.passes.analyze.bias_tables import BiasTables
    from attnopt.passes.analyze.inline_operands import Operands

_BOTH = frozenset("qk")


@dataclass(frozen=True)
class RowTable:
    """A table of queries or keys that a term of the scores reads.

    last: the dimension of relative positions, which comes last in the kernel
    """

    source: fx.Node | Product
    last: int
    words: str

    def operand(self, operands: Operands, slot: str) -> tuple[Operand, Brought]:
        if isinstance(self.source, Product):
            return self.source.operand(operands, slot)
        own = tuple((Axis(size),) for size in self.source.meta["val"].shape)
        return Operand(slot, None, E.FLOAT, "table"), Brought(
            self.source, own, _moved(own, self.last))


def _moved(items: tuple[Any, ...], last: int) -> tuple[Any, ...]:
    return (*items[:last], *items[last + 1 :], items[last])


def row_axis(idx: Index) -> str | None:
    """q or k, if an index reads a table of queries or keys at a place that depends on both; None
    where it does not."""
    places = [i for i in idx if i.indices >= _BOTH]
    others = frozenset[str]().union(*(i.indices for i in idx if not i.indices >= _BOTH)) & _BOTH
    if len(places) != 1 or len(others) != 1 or any(
            i.has("load") for i in idx if i is not places[0]):
        return None
    return next(iter(others))


def is_row_table(lifter: BiasLifter, node: fx.Node, idx: Index) -> bool:
    """Is an element that has no index function one of a table of queries or keys?"""
    return (is_tensor(node) and node.meta["val"].is_floating_point()
            and lifter.values.sources(node) is None and row_axis(idx) is not None)


def read(tables: BiasTables, e: Expr) -> Expr | None:
    """A load from a table of queries or keys as one that `tables` has found; None where it is none.

    Raises Unliftable where the index may be out of the table.
    """
    lifter: Any = tables.lifter
    axis = row_axis(e.args)
    node = lifter.nodes.get(e.value)
    if axis is None or e.dtype != E.FLOAT or node is None or lifter.values.sources(
            node) is not None:
        return None
    source: fx.Node | Product = lifter.products.get(e.value) or node
    at = next(i for i, a in enumerate(e.args) if a.indices >= _BOTH)
    length = source.positions if isinstance(source, Product) else node.meta["val"].shape[at]
    if not _within(tables, e.args[at], length):
        raise Unliftable(f"{node.name}: a relative position that may be out of its table")
    args = e.args
    if isinstance(source, Product):
        source, args = source.read(lifter, args)
    steady = motion(args[at], lambda x: "k" not in x.indices)
    form = "shift" if steady is not None and abs(steady.step) == 1 else "buckets"
    place = placed(tables, args[at], node)
    args = _moved((*args[:at], place, *args[at + 1 :]), at)
    name = f"rows{len(tables.found)}"
    words = f"{'query' if axis == 'q' else 'key'} table by relative position, {form}"
    tables.found[name] = RowTable(source, at, words)
    return E.load(name, *args)


def placed(tables: BiasTables, place: Expr, near: fx.Node) -> Expr:
    """An index as it is where it is little arithmetic, else read from a strip by distance.

    Raises Unliftable where it is neither.
    """
    from attnopt.passes.analyze.bias_tables import worth

    if not worth(place) and not place.has("load") and not decides(place):
        return place
    found = tables.table(place, near)
    if found is None:
        raise Unliftable("a relative position that does not repeat along a diagonal")
    return found


def _within(tables: BiasTables, place: Expr, length: int | torch.SymInt) -> bool:
    """Is 0 <= place < length for every query and key that matter?"""
    logic, total = tables.lifter.logic, tables.lifter.size(length)
    try:
        last = logic.sub(total, E.const(1))
        if all(logic.conj(tables.kept, logic.compare("lt", *pair)) is E.FALSE
               for pair in ((place, E.const(0)), (last, place))):
            return True
    except LookupError:
        return False
    known = tables.constants([place])
    if tables.fixed is None or known is None or not isinstance(length, int) \
            or math.prod(tables.fixed) > 2**22 or place.indices - _BOTH:
        return False
    env = Env(tables.fixed, known[0], sizes=tables.others())
    values = torch.as_tensor(evaluate(place, env))
    tables.guards |= known[1]
    return bool(values.numel()) and 0 <= int(values.min()) and int(values.max()) < length


def kept(logic: Logic, spec: Spec, slot: str) -> Expr:
    """Where the value of an operand matters: where the mask of the Spec keeps a score."""
    if slot in spec.weights.slots or spec.mask.slots:
        return E.TRUE
    try:
        return logic.canonical(spec.mask.predicate())
    except LookupError:
        return E.TRUE


def seen(logic: Logic, lifted: Lifted, where: Expr) -> Lifted:
    """An operand without those cases that never matter: what a shift brings in from the next row in
    Transformer-XL's and Music Transformer's spelling."""
    e = lifted.expr
    if where.op == "const" or not any(
            n.op == "where" and n.args[0].indices >= _BOTH for n in e.walk()):
        return lifted

    def visible(n: Expr, args: list[Expr]) -> Expr:
        if n.op == "where":
            condition = n.args[0]
            if logic.conj(where, condition) is E.FALSE:
                return args[2]
            if logic.conj(where, logic.negate(condition)) is E.FALSE:
                return args[1]
        return n if tuple(args) == n.args else E.rebuild(n, tuple(args))
    done: dict[Expr, Expr] = {}
    for n in e.walk():
        done[n] = visible(n, [done[a] for a in n.args])
    return replace(lifted, expr=done[e])


def has_rows(tables: Mapping[str, Any]) -> bool:
    """Is a table of queries or keys among them?"""
    return any(isinstance(t, RowTable) for t in tables.values())
