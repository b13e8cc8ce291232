"""Tables sampled at the place of a query less the position of a key: four look-ups for a score.

DAT (arXiv 2201.00520) adds to its scores a table sampled bilinearly at displacements,

    bias[q, k] = sample(table, ((grid(q) - p(k)) / 2))           F.grid_sample, all pairs

from a tensor of twice as many numbers as there are scores. In entries of the table, the coordinate
on each axis is a u(q) + a v(k) + c, where the u(q) of a grid are whole numbers r(q) apart from one
constant. So the fraction depends on the key alone, and with i(k) = floor(s(k)), f(k) = s(k) - i(k)

    s(k) = coordinate - r(q)
    bias[q, k] = interpolation at (f_y(k), f_x(k)) of the four entries from
                 table[r_y(q) + i_y(k), r_x(q) + i_x(k)] on

r is read off the values of the grid,
which depends on no input, for the captured lengths; that each lies within rounding of a whole
number is proven for every query. The interpolated table is continuous, so that a coordinate that
is off by the rounding of float32 is a bias that is off by as much times the steps of the table.
What is outside of the table is a rim of entries (`attnopt.kernels.padded_tables`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from attnopt.ir import expr as E
from attnopt.ir.evaluate import Env, evaluate
from attnopt.ir.expr import Expr
from attnopt.ir.spec import Operand
from attnopt.kernels import padded_tables, tabulate
from attnopt.passes.analyze.lift import Bound, Index, Unliftable, bind
from attnopt.passes.canonical import Recipe
from attnopt.passes.canonical import Tensor as Brought
from attnopt.passes.normalize import op_name
from attnopt.passes.recognize.axes import Axis

if TYPE_CHECKING:
    from attnopt.passes.analyze.bias_lifter import BiasLifter
    from attnopt.passes.analyze.inline_operands import Operands

_BOTH = frozenset("qk")
#: indices of the table's own axes while its element is looked for
_PLACES = E.index("b98"), E.index("b99")
_NAMES = ("grid_sampler", "grid_sampler_2d")
#: roundings of float32 between the grid's numbers and a coordinate, at most
_ROUNDINGS = 16
#: passes over all results that a sampling costs with the turning of its coordinates (measured 10 to
#: 25 ns for each on a CPU, one thread, float32, where a pass takes 0.5)
PASSES = 24
#: entries of a table with its rim, and queries, at most
LARGEST = 2**24


@dataclass(frozen=True)
class Steps:
    """An axis on which every query is a whole number of entries from the next one.

    places: r(q), the least of them 0; key: s(k), the coordinate without them, in float32
    length: entries of the table
    """

    places: Tensor
    key: Expr
    length: int

    @property
    def last(self) -> int:
        return int(self.places.max())

    @property
    def rim(self) -> int:
        """Entries beyond each end that some corner may read: from s = -last - 2 downwards, and from
        s = length upwards, there are no others."""
        return self.last + 2

    @property
    def padded(self) -> int:
        return self.length + 2 * self.rim

    def near(self) -> Expr:
        """s(k) within what the rim allows."""
        return E.call("minimum", E.call("maximum", self.key, float(-self.rim)), float(self.length))

    def split(self, kind: str) -> tuple[Expr, Expr]:
        """i(k) and f(k). Beyond a rim of zeros f is large, and the steps of the table are none:
        what is not finite gives nan there, as it does for `grid_sample`."""
        whole = E.call("floor", self.near())
        return whole, (self.key if kind == "zeros" else self.near()) - whole


@dataclass(frozen=True)
class SampledTable:
    """A term that is a table sampled at differences.

    table:  its node, with the dimensions that are sampled, and the indices of the others
    axes:   Steps of y and x
    """

    lifter: BiasLifter
    table: fx.Node
    dims: tuple[int, int]
    others: Index
    axes: tuple[Steps, Steps]
    kind: str
    sources: frozenset[str]
    words = "table sampled at key positions, 4 look-ups"

    @property
    def loads(self) -> dict[str, fx.Node]:
        """What it reads besides its grid: the positions of the keys and the table."""
        slots = {s for axis in self.axes for s in axis.key.slots}
        slots |= {s for i in self.others for s in i.slots}
        return {s: self.lifter.nodes[s] for s in slots} | {self.table.name: self.table}

    def declare(self, operands: Operands) -> Expr:
        """The term, with its operands declared."""
        rows, keys = self.axes
        width = keys.padded
        before = rows.rim * width + keys.rim
        row = self._literal(operands, rows.places * width + keys.places + before)
        (at_y, down), (at_x, right) = (
            tuple(operands.bind(self.lifter, e) for e in axis.split(self.kind))
            for axis in self.axes)
        key = at_y * width + at_x
        table = self._padded(operands)
        lead = [operands.bind(self.lifter, e) for e in self.others]

        def between(f: Expr, first: Expr, second: Expr) -> Expr:
            return (1.0 - f) * first + f * second

        def line(first: int) -> Expr:
            return between(right, *(E.load(table, *lead, (row + (first + i)) + key)
                                    for i in (0, 1)))
        return between(down, line(0), line(width))

    def _literal(self, operands: Operands, numbers: Tensor) -> Expr:
        slot, query = operands.new_slot(), operands.canonical.query
        own = ((Axis(numbers.shape[0]),),)
        recipe = Recipe(torch.ops.attnopt.literal.default, (query,), (),
                        tabulate.literal_text(numbers), torch.int32)
        operands.declared[slot] = (Operand(slot, None, E.INT, "table"),
                                   Brought(query.node, own, own, recipe))
        return E.load(slot, E.index("q"), dtype=E.INT)

    def _padded(self, operands: Operands) -> str:
        slot, axes = operands.new_slot(), self.axes
        own = tuple((Axis(n),) for n in self.table.meta["val"].shape)
        rims = (axes[0].rim, axes[1].rim)
        text = padded_tables.Rim(self.dims, rims, rims, self.kind)
        target = (*(a for i, a in enumerate(own) if i not in self.dims),
                  (Axis(axes[0].padded * axes[1].padded),))
        recipe = Recipe(torch.ops.attnopt.padded_table.default, (Brought(self.table, own, own),),
                        (), str(text), self.table.meta["val"].dtype)
        operands.declared[slot] = (Operand(slot, None, E.FLOAT, "table"),
                                   Brought(self.table, target, target, recipe))
        return slot


def sampled_at(lifter: BiasLifter, node: fx.Node, idx: Index) -> Expr | None:
    """The element of a bilinear sampling as a load that stands for a `SampledTable`, which the
    lifter then knows; None where it is no sampling. Raises Unliftable where it is another one."""
    if node.op != "call_function" or op_name(node) not in _NAMES or len(idx) != 4:
        return None
    a = bind(node)
    kind = padded_tables.RIMS[a.padding_mode] if a.padding_mode < 2 else ""
    if a.interpolation_mode != 0 or not kind:
        raise Unliftable(f"{node.name}: sampled otherwise than bilinearly, or reflected")
    if any(x.meta["val"].dtype != torch.float32 for x in (a.input, a.grid)):
        raise Unliftable(f"{node.name}: sampled in {node.meta['val'].dtype}")
    image, channel, *pair = idx
    if (image.indices | channel.indices) & _BOTH:
        raise Unliftable(f"{node.name}: a table of its own for each query or key")
    sizes = a.input.meta["val"].shape[2:]
    if not all(isinstance(n, int) and n > 0 for n in sizes):
        raise Unliftable(f"{node.name}: a table of unknown lengths")
    sources: set[str] = set()
    axes = tuple(
        _steps(lifter, node, lifter.element(a.grid, (image, *pair, E.const(place))), size,
               bool(a.align_corners), sources) for place, size in ((1, sizes[0]), (0, sizes[1])))
    if axes[0].padded * axes[1].padded > LARGEST:
        raise Unliftable(f"{node.name}: a table too large for its rim")
    table, dims, others = _table(lifter, a, (image, channel), sizes)
    name = f"sampled{len(lifter.samplings)}"
    lifter.samplings[name] = SampledTable(lifter, table, dims, others, (axes[0], axes[1]), kind,
                                          frozenset(sources))
    lifter.nodes[name] = table
    along = [axes[0].key, axes[1].key, *others]
    lead = sorted(frozenset().union(*(e.indices for e in along)) - _BOTH)
    return E.load(name, *map(E.index, (*lead, "q", "k")))


def read(found: dict[str, Any], guards: set[str], lifter: Any, e: Expr) -> bool:
    """Whether a load stands for a `SampledTable`, which then is among what was found."""
    sampled = getattr(lifter, "samplings", {}).get(e.value) if e.op == "load" else None
    if sampled is None:
        return False
    found[e.value] = sampled
    guards |= sampled.sources
    return True


def has_samplings(tables: dict[str, Any]) -> bool:
    return any(isinstance(t, SampledTable) for t in tables.values())


def passes(node: fx.Node) -> int:
    """Passes over its result that the author's node makes."""
    return PASSES if node.op == "call_function" and op_name(node) in _NAMES else 1


def _steps(lifter: BiasLifter, node: fx.Node, e: Expr, length: int, align_corners: bool,
           sources: set[str]) -> Steps:
    """One axis of a grid of coordinates in [-1, 1] as whole steps of the queries.

    Raises Unliftable where it has none.
    """
    at_query, at_key = _separate(lifter, node, e)
    spread = (length - 1) / 2 if align_corners else length / 2
    queries = lifter.axis_lengths["q"]
    if not isinstance(queries, int) or queries > LARGEST:
        raise Unliftable(f"{node.name}: queries of unknown number")
    if at_query.indices - {"q"}:
        raise Unliftable(f"{node.name}: places of queries that differ between heads or inputs")
    operands = {}
    for load in (n for n in at_query.leaves if n.op == "load"):
        source = lifter.nodes[load.value]
        known = lifter.values.sources(source)
        if known is None:
            raise Unliftable(f"{node.name}: a weight that depends on the query, "
                             f"{source.name} is made of an input")
        operands[str(load.value)] = lifter.values.evaluate(source).cpu().double()
        sources |= known
    env = Env((queries, 1), operands, sizes={"q": queries}, dtype=torch.float64)
    numbers = torch.as_tensor(evaluate(at_query, env), dtype=torch.float64)
    numbers = numbers.expand(queries, 1)[:, 0] * spread
    if not bool(numbers.isfinite().all()):
        raise Unliftable(f"{node.name}: places of queries that are not finite")
    places = (numbers - numbers.min()).round()
    apart = numbers - places
    start = float(apart.mean())
    off = float((apart - start).abs().max())
    allowed = _ROUNDINGS * torch.finfo(torch.float32).eps * (float(numbers.abs().max()) + length)
    if off > allowed:
        raise Unliftable(f"{node.name}: queries that are no whole number of entries apart "
                         f"({off:.2g} off)")
    offset = start + (length - 1) / 2
    if abs(offset - round(2 * offset) / 2) <= allowed:  # what a grid of corners or centres has
        offset = round(2 * offset) / 2
    return Steps(places.to(torch.int64), _folded(at_key * spread + offset), length)


def _separate(lifter: BiasLifter, node: fx.Node, e: Expr) -> tuple[Expr, Expr]:
    """(u, v) with e = u(q) + v(k). Raises Unliftable where it is no such sum."""
    if "q" not in e.indices:
        return E.const(0.0), e
    if "k" not in e.indices:
        return e, E.const(0.0)
    if e.op in ("add", "sub", "neg"):
        parts = [_separate(lifter, node, a) for a in e.args]
        return (E.call(e.op, *(u for u, _ in parts)), E.call(e.op, *(v for _, v in parts)))
    if e.op in ("mul", "div"):
        for factor, other in (e.args[::-1], e.args)[: 1 + (e.op == "mul")]:
            if not factor.indices & _BOTH:
                u, v = _separate(lifter, node, other)
                return E.call(e.op, u, factor), E.call(e.op, v, factor)
    raise Unliftable(f"{node.name}: displacements that are no place of a query less one of a key")


def _folded(e: Expr) -> Expr:
    """A sum of multiples with the numbers of each folded."""
    total, constant = E.const(0.0), 0.0
    for term, factor in _terms(e, 1.0).items():
        if term is None:
            constant = factor
        else:
            multiple = term if factor == 1 else term * factor
            total = multiple if total.op == "const" else total + multiple
    return total + constant


def _terms(e: Expr, factor: float) -> dict[Expr | None, float]:
    """Multiples that `e` is a sum of; None for the number one."""
    if e.op == "const":
        return {None: factor * float(e.value)}
    if e.op in ("add", "sub", "neg"):
        found = dict[Expr | None, float]()
        for i, a in enumerate(e.args):
            minus = e.op == "neg" or e.op == "sub" and i
            for term, times in _terms(a, -factor if minus else factor).items():
                found[term] = found.get(term, 0.0) + times
        return found
    if e.op in ("mul", "div") and e.args[1].op == "const":
        number = float(e.args[1].value)
        return _terms(e.args[0], factor * number if e.op == "mul" else factor / number)
    return {e: factor}


def _table(lifter: BiasLifter, a: Bound, lead: Index, sizes: tuple[int, int]
           ) -> tuple[fx.Node, tuple[int, int], Index]:
    """The tensor that holds the table, as far up as it has the two axes that are sampled; those,
    and the indices of its others."""
    for place, size in zip(_PLACES, sizes, strict=True):
        lifter.logic.lengths[place.value] = E.const(size)
    e = lifter.element(a.input, (*lead, *_PLACES))
    lone = E.const(0)
    wanted = tuple(lone if n == 1 else p for p, n in zip(_PLACES, sizes, strict=True))
    if e.op == "load" and lone not in wanted and all(e.args.count(p) == 1 for p in wanted):
        source = lifter.nodes[e.value]
        dims = tuple(e.args.index(p) for p in wanted)
        others = tuple(i for d, i in enumerate(e.args) if d not in dims)
        whole = all(source.meta["val"].shape[d] == n for d, n in zip(dims, sizes, strict=True))
        if whole and not any(set(i.indices) & {p.value for p in _PLACES} for i in others):
            return source, (dims[0], dims[1]), others
    return a.input, (2, 3), lead
