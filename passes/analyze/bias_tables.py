"""Biases that are looked up by where query and key are: read from a small table in the kernel.

`bias[h, q, k] = f(table[J(q, k)], h)` with a whole number J of indices: T5, MPNet and ALiBi-like
buckets of k - q, relative positions of Swin, BEiT and LeViT, an MLP of coordinates (SwinV2). J is a
buffer or index arithmetic; the table and what is done to its entries may depend on parameters and
is never read. J is proven to repeat along a diagonal (`attnopt.passes.analyze.bias_strips`):

    symbolically   J(q + 1, k + 1) and J(q, k) have one canonical form: for all lengths
    by value       on all pairs of the captured lengths, which then are fixed

The rewritten graph evaluates the author's expression at one pair of every entry of the strip
(`attnopt.kernels.tabulate`), and the kernel loads neighbouring entries for neighbouring keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from attnopt.cost.work import GATHER, INSTRUCTIONS
from attnopt.ir import expr as E
from attnopt.ir.evaluate import Env, evaluate
from attnopt.ir.expr import Expr
from attnopt.ir.mask_base import K, Q
from attnopt.ir.spec import Operand
from attnopt.kernels import tabulate
from attnopt.passes.analyze import relative_tables, sampled_bias
from attnopt.passes.analyze.bias_regions import Region, evaluated, region_of
from attnopt.passes.analyze.bias_strips import Strip, dimensions, strip_of
from attnopt.passes.analyze.by_value import Values
from attnopt.passes.analyze.inline_operands import Operands
from attnopt.passes.analyze.lift import Lifter
from attnopt.passes.analyze.relative_tables import RowTable
from attnopt.passes.analyze.sampled_bias import SampledTable
from attnopt.passes.canonical import Recipe, Target
from attnopt.passes.canonical import Tensor as Brought
from attnopt.passes.normalize import is_tensor
from attnopt.passes.recognize.axes import Axis, product, resolve

_BOTH = frozenset("qk")
#: index matrices larger than this are not looked at
LARGEST = 2**22
#: pairs that are evaluated to check a proof for all lengths
_CHECKED = 2**18


@dataclass(frozen=True)
class Tabulated:
    """A term that is a table: `points` of `expr`, with the leading axes `lead`."""

    expr: Expr
    points: Strip
    lead: tuple[str, ...]
    loads: tuple[fx.Node, ...]
    names: tuple[str, ...]
    words: str

    @property
    def exact(self) -> bool:
        """Is it the tensor's own entries, without arithmetic?"""
        return self.expr.op == "load"


Found = Tabulated | Region | RowTable | SampledTable


@dataclass
class BiasTables:
    """Terms of one operand as tables; `of` replaces them by loads of names that are in `found`.

    fixed: lengths of q and k as numbers; None where one is not known
    kept:  which scores matter
    """

    lifter: Lifter
    values: Values
    names: tuple[str, ...]
    fixed: tuple[int, int] | None
    kept: Expr = E.TRUE
    found: dict[str, Found] = field(default_factory=dict)
    guards: set[str] = field(default_factory=set)

    def of(self, e: Expr) -> Expr:
        """`e` with its terms that are look-ups by position as loads of tables."""
        if not _BOTH <= e.indices or sampled_bias.read(self.found, self.guards, self.lifter, e):
            return e
        if e.has("inner"):  # no function of positions; what is beside it may be
            return E.rebuild(e, tuple(map(self.of, e.args)))
        if e.op == "load":
            row = relative_tables.read(self, e)
            if row is not None:
                return row
        if e.dtype == E.FLOAT and worth(e):
            loaded = self.table(e)
            if loaded is not None:
                return loaded
            chosen = self.choice(e)
            if chosen is not None:
                return chosen
        if e.dtype == E.FLOAT and e.has("load"):
            same = self.region(e)
            if same is not None:
                equal, found = same
                return E.where(equal, found.inside, found.outside)
        if e.op == "load":
            kept = self.entries(e)
            return e if kept is None else kept
        args = tuple(map(self.of, e.args))
        return e if args == e.args else E.rebuild(e, args)

    def table(self, e: Expr, near: fx.Node | None = None) -> Expr | None:
        """A term as a load of a table; None where it is none.

        near: a tensor of the table's device, for a term that loads none
        """
        parts = _positions(e)
        if parts is None:
            return None
        lead = tuple(a for a in self.names if a in e.indices and a not in "qk")
        nodes = {leaf.value: self.lifter.nodes.get(leaf.value) for leaf in e.leaves
                 if leaf.op == "load"}
        if not nodes and near is not None:
            nodes = {near.name: near}
        if not nodes or not all(is_tensor(n) for n in nodes.values()):
            return None
        strip, words = self.symbolic(parts), "table by distance, 1-D"
        if strip is None:
            by_value = self.by_value(_positions(e, E.TRUE) or [])
            if by_value is None:
                return None
            strip, words = by_value
        return self.load(e, Tabulated(
            e, strip, lead, tuple(nodes.values()), tuple(nodes), words))

    def entries(self, e: Expr) -> Expr | None:
        """A constant of queries x keys whose own entries repeat as a load of a table: what an
        author looked up before and keeps (LeViT in evaluation mode)."""
        lead = tuple(a for a in self.names if a in e.indices and a not in "qk")
        node, heads = self.lifter.nodes.get(e.value), self.others().get("h", 0) if lead else 1
        if e.dtype != E.FLOAT or not is_tensor(node) or lead not in ((), ("h",)) or not heads \
                or self.fixed is None or heads * self.fixed[0] * self.fixed[1] > LARGEST:
            return None
        found = self.by_value([e.replace({E.index("h"): E.const(h)}) for h in range(heads)])
        return None if found is None else self.load(e, Tabulated(
            e, found[0], lead, (node,), (str(e.value),), found[1]))

    def load(self, e: Expr, table: Tabulated) -> Expr:
        """`e` as a load of a table."""
        name, lead, strip = f"strip{len(self.found)}", table.lead, table.points
        self.found[name] = table
        among, others = (E.load(name, *map(E.index, lead), p, dtype=e.dtype)
                         for p in strip.places())
        return others if not strip.extra else E.where(strip.extra <= K, others, among)

    def choice(self, e: Expr) -> Expr | None:
        """A choice between two tables by the region of a window's tokens: what is left of a sum of
        a bias and a fill once the lifter has pushed the sum into the cases of the fill."""
        selectors = {n for n in e.walk() if n.dtype == E.BOOL and _BOTH < n.indices and not any(
            a.dtype == E.BOOL for a in n.args)}
        if len(selectors) != 1:
            return None
        (selector,) = selectors
        same = self.region(selector)
        if same is None:
            return None
        equal, found = same
        inside, outside = (self.table(e.replace({selector: E.const(bool(x))}))
                           for x in (found.inside, found.outside))
        return None if inside is None or outside is None else E.where(equal, inside, outside)

    def region(self, e: Expr) -> tuple[Expr, Region] | None:
        """A term that is one thing within regions and another one between them: where its tokens
        are of one region, and the regions."""
        known = self.constants([e])
        if known is None or self.fixed is None:
            return None
        operands, sources = known
        sizes = {**self.others(), "q": self.fixed[0], "k": self.fixed[1]}
        e, places = _periods(e, sizes)
        values = evaluated(e, operands, sizes, self.names)
        node = next((self.lifter.nodes[s] for s in operands), None)
        found = None if values is None or node is None else region_of(*values, node)
        if found is None:
            return None
        self.guards |= sources
        name = f"regions{len(self.found)}"
        self.found[name] = found
        row, key = (E.load(name, *(places.get(a, E.index(a)) for a in found.lead), i, dtype=E.INT)
                    for i in (Q, K))
        return row.eq(key), found

    # -- proofs -----------------------------------------------------------------------------
    def symbolic(self, parts: list[Expr]) -> Strip | None:
        """Functions of k - q, for all lengths."""
        if any(p.has("load") for p in parts):
            return None
        logic, step = self.lifter.logic, E.const(1)
        moved = {Q: Q + step, K: K + step}
        try:
            if not all(logic.canonical(p.replace(moved)) is logic.canonical(p) for p in parts):
                return None
        except LookupError:
            return None
        sizes = self.fixed or (48, 40)
        if sizes[0] * sizes[1] <= _CHECKED and not _holds(Strip(), parts, {}, sizes, self.others()):
            return None
        return Strip()

    def by_value(self, parts: list[Expr]) -> tuple[Strip, str] | None:
        """A strip that all pairs of the captured lengths agree with."""
        if not parts or self.fixed is None or self.fixed[0] * self.fixed[1] > LARGEST:
            return None
        known = self.constants(parts)
        if known is None:
            return None
        operands, sources = known
        env = Env(self.fixed, operands, sizes=self.others())
        matrices = [torch.as_tensor(evaluate(p, env)).expand(self.fixed) for p in parts]
        strip = strip_of(matrices)
        if strip is None or not _holds(strip, parts, operands, self.fixed, self.others()):
            return None
        self.guards |= sources
        dims = max(dimensions(m, strip) for m in matrices)
        extra = f" with {strip.extra} extra token{'s'[:strip.extra > 1]}" if strip.extra else ""
        return strip, f"table by distance, {dims}-D{extra}"

    def constants(self, parts: list[Expr]) -> tuple[dict[str, Tensor], set[str]] | None:
        """The values of what is loaded, and the buffers that they are made of; None where an
        input or a parameter takes part."""
        operands: dict[str, Tensor] = {}
        sources: set[str] = set()
        for leaf in {leaf for p in parts for leaf in p.leaves if leaf.op == "load"}:
            node = self.lifter.nodes[leaf.value]
            known = self.values.sources(node) if is_tensor(node) else None
            if known is None:
                return None
            sources |= known
            try:
                operands[leaf.value] = self.values.evaluate(node).cpu()
            except LookupError:
                return None
        return operands, sources

    def others(self) -> dict[str, int]:
        """Lengths of leading axes that are known."""
        return {a: n for a, n in self.lifter.axis_lengths.items()
                if isinstance(n, int) and a not in "qk"}


def _holds(strip: Strip, parts: list[Expr], operands: Mapping[str, Tensor],
           sizes: tuple[int, int], others: Mapping[str, int]) -> bool:
    """Does every pair find its own value in the strip?"""
    known = {**others, "q": sizes[0], "k": sizes[1]}
    env = Env(sizes, operands, sizes=known)
    count = int(evaluate(strip.count, env))
    points = Env((1, count), operands, sizes=known)
    at = dict(zip((Q, K), strip.pair(K), strict=True))
    among, rest = (torch.as_tensor(evaluate(p, env)).expand(sizes) for p in strip.places())
    places = torch.where(torch.arange(sizes[1]) < strip.extra, among, rest)
    if int(places.min()) < 0 or int(places.max()) >= count:
        return False
    for part in parts:
        table = torch.as_tensor(evaluate(part.replace(at), points)).expand(1, count)[0]
        wanted = torch.as_tensor(evaluate(part, env)).expand(sizes)
        if not torch.equal(table[places], wanted):
            return False
    return True


def _positions(e: Expr, under: Expr | None = None) -> list[Expr] | None:
    """The whole numbers and truth values by which `e` depends on query and key; None where it
    depends on them in another way.

    under: where `e` matters; the numbers are 0 elsewhere
    """
    if not e.indices & _BOTH:
        return []
    if e.dtype != E.FLOAT:
        if not e.indices <= _BOTH:
            return None
        if under is None:
            return [e]
        return [under & e if e.dtype == E.BOOL else E.where(under, e, 0)]
    places = [under] * len(e.args)
    if under is not None and e.op == "where":
        places = [under, under & e.args[0], under & ~e.args[0]]
    found: list[Expr] = []
    for a, place in zip(e.args, places, strict=True):
        parts = _positions(a, place)
        if parts is None:
            return None
        found += [p for p in parts if p not in found]
    return found


def _periods(e: Expr, sizes: dict[str, int]) -> tuple[Expr, dict[str, Expr]]:
    """`e` with axes that it sees modulo a number as axes of that length, and their indices."""
    places: dict[str, Expr] = {}
    for axis in e.indices - _BOTH:
        used = {n for n in e.walk() if E.index(axis) in n.args}
        if len(used) == 1:
            (n,) = used
            if n.op == "mod" and n.args[0] is E.index(axis) and n.args[1].op == "const":
                places[axis], sizes[axis] = n, n.args[1].value
                e = e.replace({n: E.index(axis)})
    return e, places


def worth(e: Expr) -> bool:
    """Is a look-up by position in it, or more arithmetic than a load costs?"""
    if any(leaf.op == "load" and any(_BOTH <= a.indices for a in leaf.args) for leaf in e.leaves):
        return True
    dear = sum(INSTRUCTIONS.get(n.op, 1.0) for n in e.walk() if _BOTH <= n.indices)
    return dear > 2 * GATHER


def declare(operands: Operands, expr: Expr, tables: Mapping[str, Found]) -> None:
    """Bind the loads of tables in `expr` to new operands that the rewritten graph makes."""
    slots: dict[str, str] = {}
    loads = sorted((n for n in expr.leaves if n.op == "load" and n.value in tables), key=str)
    for load in sorted(loads, key=lambda n: any(a.has("load") for a in n.args)):
        name = str(load.value)
        found = tables[name]
        if isinstance(found, SampledTable):
            operands.bound[load] = found.declare(operands)
            continue
        if name not in slots:
            slot = slots[name] = operands.new_slot()
            if isinstance(found, RowTable):
                operands.declared[slot] = found.operand(operands, slot)
            else:
                made = _regions if isinstance(found, Region) else _points
                operands.declared[slot] = (
                    Operand(slot, None, load.dtype, "table"), made(operands, found))  # type: ignore
        places = (a.replace(operands.bound) for a in load.args)
        operands.bound[load] = E.load(slots[name], *places, dtype=load.dtype)


def _points(operands: Operands, table: Tabulated) -> Brought:
    """The table as a tensor (*lead, points) of the rewritten graph."""
    place = dict(zip(operands.names, map(resolve, operands.scores), strict=True))
    axes = ("q", "k", *table.lead)
    given = []
    for node in table.loads:
        own = tuple((Axis(size),) for size in node.meta["val"].shape)
        given.append(Brought(node, own, own))
    rows, keys = (product(place[a]) for a in "qk")
    count = rows + keys - 1 if table.points.rows == 1 and not table.points.extra \
        else table.points.count.value
    pair = dict(zip((Q, K), table.points.pair(K), strict=True))
    text = tabulate.Points(str(table.expr.replace(pair)), str(table.points.count), table.names,
                           axes, table.lead, table.exact)
    alone = table.loads[table.names.index(str(table.expr.value))] if table.exact else None
    dtype = alone.meta["val"].dtype if alone is not None else \
        torch.int64 if table.expr.dtype == E.INT else torch.float32
    recipe = Recipe(torch.ops.attnopt.tabulate.default, tuple(given),
                    tuple(place[a] for a in axes), str(text), dtype)
    target: Target = (*(place[a] for a in table.lead), (Axis(count),))
    return Brought(table.loads[0], target, target, recipe)


def _regions(operands: Operands, found: Region) -> Brought:
    """The regions as a tensor (*lead, tokens) of the rewritten graph."""
    own = tuple((Axis(n),) for n in found.ids.shape)
    recipe = Recipe(torch.ops.attnopt.literal.default, (operands.canonical.query,), (),
                    tabulate.literal_text(found.ids), torch.int32)
    return Brought(found.node, own, own, recipe)
