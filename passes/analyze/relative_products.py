"""Products of queries or keys and embeddings of relative positions, as one small table.

Shaw et al. (arXiv 1803.02155; BERT's `relative_key`, `relative_key_query`, wav2vec2-bert) write

    bias[b, h, q, k] = sum over d of x[b, h, q, d] * e[f(q, k), d]

with the embeddings e[f(q, k)] gathered first: a tensor of queries x keys x head_dim. The sum is an
element of a table without them,

    R[b, h, q, r] = sum over d of x[b, h, q, d] * e[r, d]        bias = R[b, h, q, f(q, k)]

and likewise of the keys, R[b, h, k, f(q, k)]. `product` finds both factors of an einsum, a matrix
product or a sum of products by lifting them at a place d of the dimension that is summed over: one
is an element of a row, the other one a look-up by where query and key are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.lanes import motion
from attnopt.ir.spec import Operand
from attnopt.kernels.relative_tables import INNER, PLACE, Dims, Layout
from attnopt.passes.analyze.lift import Bound, Index, bind
from attnopt.passes.analyze.lift_views import put
from attnopt.passes.canonical import Recipe
from attnopt.passes.canonical import Tensor as Brought
from attnopt.passes.normalize import is_tensor, op_name
from attnopt.passes.recognize.axes import Axis, resolve

if TYPE_CHECKING:
    from attnopt.passes.analyze.bias_lifter import BiasLifter
    from attnopt.passes.analyze.inline_operands import Operands

_BOTH = frozenset("qk")
_D = E.index("d")
_PRODUCTS = ("matmul", "bmm", "mm")
Factor = tuple[Any, Index]


@dataclass(frozen=True)
class Product:
    """R = x e^T, with the layout in which the rewritten graph makes it.

    rows: the tensor x; table: the tensor e; place: its dimension of relative positions
    names: axes of the scores
    """

    rows: fx.Node
    table: fx.Node
    place: int
    layout: Layout

    @property
    def positions(self) -> int | torch.SymInt:
        """The number of rows of the table."""
        return self.table.meta["val"].shape[self.place]  # type: ignore[no-any-return]

    @property
    def axis(self) -> str:
        """q or k: whose rows it holds."""
        return self.layout.result[-1]

    def read(self, lifter: BiasLifter, args: Index) -> tuple[Product, Index]:
        """The product with those positions alone that an index reaches, in the order in which
        neighbouring keys read neighbours; and the indices into it."""
        *lead, place = args
        low, high = lifter.logic.bounds(place)
        first, count, layout = 0, self.positions, self.layout
        if isinstance(count, int) and 0 <= low <= high < count:
            first, count = int(low), int(high - low + 1)
            layout = replace(layout, first=first, count=count)
        falls = motion(place, lambda e: "k" not in e.indices)
        logic = lifter.logic
        if falls is not None and falls.step == -1 and not falls.block:
            layout = replace(layout, descending=True)
            last = logic.add(E.const(first), logic.sub(lifter.size(count), E.const(1)))
            place = logic.sub(last, place)
        else:
            place = logic.sub(place, E.const(first))
        return replace(self, layout=layout), (*lead, place)

    def operand(self, operands: Operands, slot: str) -> tuple[Operand, Brought]:
        """The table as an operand that the rewritten graph makes."""
        place = dict(zip(operands.names, map(resolve, operands.scores), strict=True))
        layout = self.layout
        given = tuple(Brought(n, own, own) for n in (self.rows, self.table)
                      for own in [tuple((Axis(size),) for size in n.meta["val"].shape)])
        count = layout.count if layout.count >= 0 else self.positions
        target = (*(place[a] for a in layout.result), (Axis(count),))
        recipe = Recipe(torch.ops.attnopt.relative_table.default, given,
                        tuple(place[a] for a in layout.axes), str(layout),
                        self.rows.meta["val"].dtype)
        return Operand(slot, None, E.FLOAT, "table"), Brought(self.rows, target, target, recipe)


def product_at(lifter: BiasLifter, node: fx.Node, idx: Index) -> Expr | None:
    """The element of a sum of products as an element of a `Product`, which the lifter then knows;
    None where it is none. Raises Unliftable where a factor has no index function."""
    found = _factors(lifter, node, idx)
    if found is None or not node.meta["val"].is_floating_point():
        return None
    length, factors = found
    dtypes = {x.meta["val"].dtype for x, _ in factors}
    if dtypes != {node.meta["val"].dtype}:
        return None
    elements = [lifter.element(x, i) for x, i in factors]
    for x, y in (elements, reversed(elements)):
        made = _of_loads(lifter, x, y)
        if made is not None:
            return made
    return None


def _factors(lifter: BiasLifter, node: fx.Node, idx: Index) -> tuple[int, list[Factor]] | None:
    """The length of the dimension that a node sums over, and both factors at a place along it."""
    name = op_name(node) if node.op == "call_function" else ""
    a = bind(node)
    if name in _PRODUCTS:
        left, right = node.args[:2]
        ranks = [x.meta["val"].dim() for x in (left, right)]  # type: ignore[union-attr]
        if min(ranks) < 2:
            return None
        length = left.meta["val"].shape[-1]  # type: ignore[union-attr]
        d = _inner(lifter, length)
        *lead, i, j = idx
        first, second = (tuple(lead[len(lead) - (r - 2):]) for r in ranks)
        return None if d is None else (length, [(left, (*first, i, d)), (right, (*second, d, j))])
    if name == "einsum":
        return _einsum(lifter, a, idx)
    if name == "sum":
        return _sum(lifter, node, a, idx)
    return None


def _inner(lifter: BiasLifter, length: Any) -> Expr | None:
    """The index along a dimension of that length, which all products of a site share."""
    if not isinstance(length, int) or length < 2:
        return None
    known = lifter.logic.lengths.setdefault("d", E.const(length))
    return _D if known is E.const(length) else None


def _einsum(lifter: BiasLifter, a: Bound, idx: Index) -> tuple[int, list[Factor]] | None:
    inputs, arrow, output = a.equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or "." in a.equation or len(terms) != 2 or len(a.tensors) != 2 or any(
            len(set(t)) != len(t) for t in (*terms, output)):
        return None
    summed = set("".join(terms)) - set(output)
    if len(summed) != 1 or not all(summed <= set(t) for t in terms):
        return None
    (letter,) = summed
    length = a.tensors[0].meta["val"].shape[terms[0].index(letter)]
    d = _inner(lifter, length)
    if d is None:
        return None
    place = dict(zip(output, idx, strict=True)) | {letter: d}
    return length, [(x, tuple(place[c] for c in term))
                    for x, term in zip(a.tensors, terms, strict=True)]


def _sum(lifter: BiasLifter, node: fx.Node, a: Bound, idx: Index
         ) -> tuple[int, list[Factor]] | None:
    """(x * y).sum(dim)"""
    whole = node.args[0]
    if not is_tensor(whole) or op_name(whole) not in ("mul", "multiply") \
            or a.get("dtype") is not None:
        return None
    rank = whole.meta["val"].dim()
    dims = a.get("dim")
    dims = (dims,) if isinstance(dims, int) else dims
    pair = whole.args[:2]
    if not dims or len(dims) != 1 or len(pair) != 2 or not all(map(is_tensor, pair)):
        return None
    dim = dims[0] % rank
    length = whole.meta["val"].shape[dim]
    d = _inner(lifter, length)
    if d is None:
        return None
    at = put(idx, dim, d) if a.get("keepdim") else (*idx[:dim], d, *idx[dim:])
    if any(x.meta["val"].shape[dim - rank:][:1] != (length,) for x in pair):  # type: ignore
        return None
    return length, [(x, at[len(at) - x.meta["val"].dim():]) for x in pair]  # type: ignore


def _of_loads(lifter: BiasLifter, x: Expr, y: Expr) -> Expr | None:
    """The product of an element of a row and an element that is looked up by query and key."""
    if x.op != "load" or y.op != "load" or x.indices >= _BOTH or not y.indices >= _BOTH:
        return None
    rows, table = lifter.nodes[x.value], lifter.nodes[y.value]
    places = [i for i, e in enumerate(y.args) if e.indices >= _BOTH]
    own = x.indices & _BOTH
    if len(own) != 1 or len(places) != 1 or "d" in y.args[places[0]].indices:
        return None
    named = [_dims(lifter, rows, x, []), _dims(lifter, table, y, places)]
    if None in named:
        return None
    of_rows, of_table = named
    assert of_rows is not None and of_table is not None
    flat = [{a for run in dims for a in run} for dims in named if dims is not None]
    if flat[1] & _BOTH:  # a table for every row is what it is to spare
        return None
    names = [*(a for a in _in_order(lifter) if a in flat[0] | flat[1]), *own]
    length = lifter.logic.lengths["d"].value
    layout = Layout(of_rows, of_table, tuple(names), tuple(names), length)
    name = f"relative{len(lifter.products)}"
    lifter.products[name] = Product(rows, table, places[0], layout)
    lifter.nodes[name] = rows
    return E.load(name, *map(E.index, names), y.args[places[0]])


def _in_order(lifter: BiasLifter) -> list[str]:
    """Leading axes in the order of tensors."""
    return [a for a in lifter.axis_lengths if a not in _BOTH]


def _dims(lifter: BiasLifter, node: fx.Node, e: Expr, places: list[int]) -> Dims | None:
    """The axes that every dimension of a load follows; None where one follows none, or one is
    followed twice."""
    orders = [[*_in_order(lifter), own, "d"] for own in "qk"] + [[*_in_order(lifter), "d"]]
    runs = [tuple(order[i:j]) for order in orders
            for i in range(len(order)) for j in range(i + 1, len(order) + 1)]
    found: list[tuple[str, ...]] = []
    for dim, (n, at) in enumerate(zip(node.meta["val"].shape, e.args, strict=True)):
        if dim in places:
            found.append((PLACE,))
        elif n == 1:
            found.append(())
        else:
            run = next((r for r in runs if lifter.indices((r,))[0] is at
                        and lifter.size(n) is _length(lifter, r)), None)
            if run is None:
                return None
            found.append(tuple(INNER if a == "d" else a for a in run))
    flat = [a for run in found for a in run]
    return tuple(found) if len(set(flat)) == len(flat) and INNER in flat else None


def _length(lifter: BiasLifter, run: tuple[str, ...]) -> Expr:
    return lifter.logic.product([lifter.logic.lengths[a] for a in run])

