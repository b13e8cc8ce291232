"""Results of an attention as products of moved weights with values, put back: see `regather`.

    o = w[..., 0] * shift(v, 0) + w[..., 1] * shift(v, 1) + ...        one product for each place
    o[c] = skewed(w)[c] @ chunk(v)[c]                                  weights moved into a matrix

Each product is read as pairs of a weight and a value for every result; every weight of a row must
meet one value at most, and weights that meet none have a value of 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.passes import oracle
from attnopt.passes.analyze.local_bases import Space
from attnopt.passes.analyze.movement import Mover, Piece, shape_of, squeezed
from attnopt.passes.analyze.regather_tokens import LETTERS, Gathered, emit, random_values, tried
from attnopt.passes.normalize import is_tensor, op_name
from attnopt.passes.recognize.axes import Axis, Layout, broadcast
from attnopt.passes.recognize.contraction import contraction, reduced_dims
from attnopt.passes.recognize.layout import LAYOUT_OPS
from attnopt.passes.recognize.pointwise import is_cast
from attnopt.passes.recognize.program import Program
from attnopt.rules import Decline

aten = torch.ops.aten


def summed(program: Program, mover: Mover, softmax: fx.Node) -> Sum | None:
    """The result of the attention around `softmax`; None where its weights meet the values by
    layout operations and one contraction alone."""
    dim = softmax.args[1] % softmax.meta["val"].dim()  # type: ignore[operator]
    weights = _used_weights(program, softmax, dim)
    moved, products, plain = _products(program, weights)
    if not products:
        raise Decline("the weights meet no values", softmax)
    if len(products) == 1 and (plain or op_name(products[0]) == "mul"):  # in place, or no sum
        return None
    end = _end(program, products)
    return Sum(program, mover, weights, dim, end, _terms(program, end, products), moved).read()


def _used_weights(program: Program, softmax: fx.Node, dim: int) -> fx.Node:
    """The weights of `softmax` after conversions, dropout that is off and whole rows set to 0."""
    node = softmax
    while True:
        users = program.users(node)
        name = op_name(users[0]) if len(users) == 1 and users[0].op == "call_function" else ""
        if not name or users[0].args[0] is not node or shape_of(users[0]) != shape_of(node):
            return node
        user = users[0]
        if name == "dropout" and user.args[2] is False or is_cast(user):
            node = user
            continue
        if name != "masked_fill" or user.args[2] != 0 or not is_tensor(user.args[1]):
            return node
        rows = shape_of(user.args[1])
        place = dim - (len(shape_of(node)) - len(rows))
        if 0 <= place and rows[place] != 1:
            return node
        node = user


def _products(program: Program, weights: fx.Node) -> tuple[set[fx.Node], list[fx.Node], bool]:
    """What the weights are moved to, what they are multiplied with, and whether they are but laid
    out otherwise in between."""
    from attnopt.passes.analyze.movement_rules import RULES

    moved, products, plain = {weights}, dict[fx.Node, None](), True
    stack = [weights]
    while stack:
        for user in program.users(stack.pop()):
            name = op_name(user) if user.op == "call_function" else ""
            if name in RULES:
                plain = plain and (name in LAYOUT_OPS or is_cast(user))
                if user not in moved:
                    moved.add(user)
                    stack.append(user)
                continue
            sums = [u for u in program.users(user) if contraction(u) is not None] \
                if name == "mul" else []
            if len(sums) == 1 and program.users(user) == sums:
                products[sums[0]] = None
            elif name == "mul" or contraction(user) is not None:
                plain = plain and name != "mul"
                products[user] = None
            elif plain:
                raise LookupError(f"weights that are used by {name or user.op} where they are made")
            else:
                raise Decline(f"weights that are used by {name or user.op}", user)
    return moved, list(products), plain


def _end(program: Program, products: Sequence[fx.Node]) -> fx.Node:
    """The sum of all products."""
    node, rest = products[0], set(products)
    if len(rest) == 1:
        return node
    for _ in range(4 * len(rest)):
        users = program.users(node)
        if len(users) != 1 or op_name(users[0]) not in ("add", "stack", "sum"):
            break
        node = users[0]
    if op_name(node) not in ("add", "sum"):
        raise Decline("products of weights that are not summed", node)
    return node


def _terms(program: Program, node: Any, products: Sequence[fx.Node]) -> list[fx.Node]:
    if node in products:
        return [node]
    number = node if isinstance(node, int | float) else program.constant(node)
    if number == 0:
        return []
    name = op_name(node)
    if name == "add" and not node.kwargs and len(node.args) == 2:
        return [t for a in node.args for t in _terms(program, a, products)]
    if name == "sum" and is_tensor(node.args[0]) and op_name(node.args[0]) == "stack":
        parts, *dim = node.args[0].args
        dims, keep = reduced_dims(node)
        rank = node.args[0].meta["val"].dim()
        if not keep and dims == {(dim[0] if dim else 0) % rank}:
            return [t for p in parts for t in _terms(program, p, products)]
    raise Decline("a sum of products of weights and of something else", node)


@dataclass
class _Pairs:
    """Which weight meets which value: indices over the result and, last, places of the sum."""

    weights: Piece
    value: Piece
    fills: list[tuple[Tensor, float]]
    count: int


class Sum:
    """A result, as one contraction of the weights with gathered values."""

    def __init__(self, program: Program, mover: Mover, weights: fx.Node, dim: int, end: fx.Node,
                 terms: list[fx.Node], moved: set[fx.Node]) -> None:
        self.program, self.mover, self.weights, self.dim = program, mover, weights, dim
        self.end, self.terms, self.moved = end, terms, moved
        self.shape = tuple(shape_of(end))
        self.own = [Axis(n) for n in self.shape]
        self.places = shape_of(weights)[dim]

    def read(self) -> Sum:
        pairs = [self._pairs(t) for t in self.terms]
        if len({p.value.node for p in pairs}) != 1:
            raise Decline("weights that meet values of several tensors", self.end)
        node = pairs[0].value.node
        assert node is not None
        self.value = node

        def joined(of: Any) -> Tensor:
            return _joined([of(p) for p in pairs], [p.count for p in pairs])

        self.rank = len(shape_of(self.weights))
        index = [joined(lambda p, d=d: p.weights.index[d]) for d in range(self.rank)]
        where = joined(lambda p: p.weights.where)
        self._lay_out(index, where)
        self._gather(index[self.dim], where,
                     [joined(lambda p, d=d: p.value.index[d]) for d in range(len(shape_of(node)))],
                     joined(lambda p: p.value.where),
                     {v: joined(lambda p, v=v: _or(p.fills, v))
                      for p in pairs for _, v in p.fills})
        return self

    def _pairs(self, product: fx.Node) -> _Pairs:
        if shape_of(product) != list(self.shape):
            raise Decline("products that are broadcast", product)
        read = contraction(product)
        if read is not None and not read.contracted and op_name(product) == "mul":
            read = None
        layouts: list[Layout]
        if read is not None:
            if read.addend is not None or read.alpha != 1 or len(read.contracted) > 1:
                raise Decline("a contraction with the values that does more", product)
            nodes, layouts = [read.left, read.right], [read.left_layout, read.right_layout]
            place = {dim[0]: a for dim, a in zip(read.out_layout, self.own, strict=True) if dim}
            layouts = [tuple(tuple(place.get(a, a) for a in dim) for dim in x) for x in layouts]
            last = next(iter(read.contracted), None) or Axis(1)
        else:
            nodes = [a for a in product.args if is_tensor(a)]  # type: ignore[misc]
            whole: Layout = tuple((a,) for a in self.own)
            layouts = [broadcast(whole, shape_of(n)) for n in nodes]
            last = Axis(1)
        sides = [i for i, n in enumerate(nodes) if n in self.moved]
        if len(nodes) != 2 or len(sides) != 1:
            raise Decline("weights that meet no values", product)
        space = Space((*self.own, last))
        w, v = sides[0], 1 - sides[0]
        indices = [tuple(space.along(dim) for dim in layout) for layout in layouts]
        found = self.mover.pull(nodes[w], indices[w])
        weights = [p for p in found if p.node is self.weights]
        if len(weights) != 1 or any(p.node is not None or p.value != 0 for p in found
                                    if p is not weights[0]):
            raise Decline("weights that are moved with something else", product)
        values = self.mover.pull(nodes[v], indices[v], weights[0].where)
        tensors = [p for p in values if p.node is not None]
        if len(tensors) != 1:
            raise Decline("values of several tensors", product)
        return _Pairs(weights[0], tensors[0], [(p.where, p.value) for p in values
                                               if p.node is None], last.size)

    def _lay_out(self, index: list[Tensor], where: Tensor) -> None:
        """How the weights are laid out along the result: `split`, `order` and `merged` lengths of a
        view, a permutation and a view."""
        parts: dict[Axis, list[tuple[int, int, int, int]]] = {a: [] for a in self.own}
        split: list[list[tuple[int, Axis, int]]] = [[] for _ in index]
        for d, x in enumerate(index):
            if d == self.dim or shape_of(self.weights)[d] == 1:
                continue
            row = x
            if x.shape[-1] > 1:
                places, first = torch.broadcast_tensors(x, where.int().argmax(-1, keepdim=True))
                row = torch.take_along_dim(places, first, -1)[..., :1]
            if bool(((x != row) & where).any()):
                raise Decline("weights of several rows for one result", self.end)
            row = squeezed(row)
            total = torch.zeros_like(row)
            for axis, a in enumerate(self.own):
                if row.shape[axis] == 1:
                    continue
                line = row[tuple(slice(None) if i == axis else 0 for i in range(row.dim()))]
                steps = (line - line[0]).tolist()
                m = next(i for i, s in enumerate(steps) if s)
                span = next((i for i in range(m, len(steps)) if steps[i] == 0), len(steps))
                parts[a].append((m, span // m, d, steps[m]))
                split[d].append((steps[m], a, m))
                shape = [-1 if i == axis else 1 for i in range(row.dim())]
                at = torch.arange(len(steps))
                total = total + (at // m % (span // m) * steps[m]).view(shape)
            if not torch.equal(*torch.broadcast_tensors(total, row)):
                raise Decline("weights that are laid out in no order", self.end)
        self.split: list[int] = []
        names: list[tuple[Axis, int] | None] = []
        for d, n in enumerate(shape_of(self.weights)):
            own = sorted(split[d], key=lambda s: -s[0])
            counts = [next(c for m, c, e, _ in parts[a] if (m, e) == (first, d))
                      for _, a, first in own]
            if d == self.dim:
                own, counts = [], [n]
                names.append(None)
            elif [s for s, _, _ in own] != [math.prod(counts[i + 1:]) for i in range(len(own))] \
                    or math.prod(counts) != n:
                raise Decline("weights that are laid out in no order", self.end)
            names += [(a, first) for _, a, first in own]
            self.split += counts
        order, self.merged, self.axes = [], list[int](), list[Axis]()
        for a in self.own:
            digits = sorted(parts[a])
            if not digits:
                continue
            if [m for m, *_ in digits] != [math.prod(c for _, c, *_ in digits[:i])
                                           for i in range(len(digits))] \
                    or math.prod(c for _, c, *_ in digits) != a.size:
                raise Decline("weights that are laid out in no order", self.end)
            order += [names.index((a, m)) for m, *_ in reversed(digits)]
            self.merged.append(a.size)
            self.axes.append(a)
        self.order = [*order, names.index(None)]
        self.merged.append(self.places)

    def _gather(self, place: Tensor, where: Tensor, index: list[Tensor], inside: Tensor,
                fills: dict[float, Tensor]) -> None:
        """The values by result and place of the window, instead of place of the sum."""
        place, where = torch.broadcast_tensors(place, where)
        count = place.shape[-1]
        at = torch.where(where, place, self.places)
        size = (*place.shape[:-1], self.places + 1)
        met = torch.zeros(size, dtype=torch.int64).scatter_add_(-1, at, where.long())
        if bool((met[..., :-1] > 1).any()):
            raise Decline("a weight that meets several values", self.end)
        back = torch.full(size, -1).scatter_(-1, at, torch.arange(count).expand(at.shape))
        back = back[..., :-1]

        def by_place(x: Tensor) -> Tensor:
            if x.shape[-1] == 1 and count != 1:
                return x
            lead = torch.broadcast_shapes(x.shape[:-1], back.shape[:-1])
            return squeezed(x.expand(*lead, x.shape[-1]).gather(
                -1, back.clamp(min=0).expand(*lead, self.places)))

        unused = squeezed(back < 0)
        gone = [(unused, 0.0)] if bool(unused.any()) else []
        gone += [(by_place(mask), value) for value, mask in fills.items()]
        self.gathered = Gathered(tuple(map(by_place, index)), tuple(gone),
                                 (*self.shape, self.places))

    def equation(self) -> str:
        letters = dict(zip(self.own, LETTERS, strict=False))
        own = "".join(letters.values())
        return f"{''.join(letters[a] for a in self.axes)}t,{own}t->{own}"

    def try_out(self) -> None:
        tried(self.gathered, self.end)
        known = random_values(self.weights, self.value)
        weights = known[self.weights].reshape(self.split).permute(self.order).reshape(self.merged)
        mine = torch.einsum(self.equation(), weights, self.gathered(known[self.value]))
        author = oracle.run(self.end, known, precise=True)
        torch.testing.assert_close(mine, author)

    def put(self) -> None:
        view = self.program.view
        with view.graph.inserting_before(self.end):
            values = emit(view, self.gathered, (self.value,), self.value, self.gathered.shape,
                          self.value)
            weights = self.weights
            permuted = [self.split[i] for i in self.order]
            for target, to, shape in ((aten.reshape.default, self.split, self.split),
                                      (aten.permute.default, self.order, permuted),
                                      (aten.reshape.default, self.merged, self.merged)):
                if to != (list(range(len(self.split))) if target is aten.permute.default
                          else shape_of(weights)):
                    weights = emit(view, target, (weights, list(to)), self.weights, shape,
                                   self.weights)
            made = emit(view, aten.einsum.default, (self.equation(), [weights, values]), self.end,
                        self.shape, self.end)
        self.end.replace_all_uses_with(made)


def _or(fills: list[tuple[Tensor, float]], value: float) -> Tensor:
    found = [mask for mask, v in fills if v == value]
    return found[0] if found else torch.zeros((), dtype=torch.bool)


def _joined(parts: list[Tensor], counts: list[int]) -> Tensor:
    """Index tensors of several products, one behind the other along the places of the sum."""
    if len(parts) == 1:
        return parts[0]
    rank = max(p.dim() for p in parts)
    parts = [p.reshape((1,) * (rank - p.dim()) + p.shape) for p in parts]
    lead = torch.broadcast_shapes(*(p.shape[:-1] for p in parts))
    return squeezed(torch.cat([p.expand(*lead, n) for p, n in zip(parts, counts, strict=True)], -1))
