"""Scores and weights that are moved between products and softmax, put back: shifts and skews.

A model may move the *scores* of a local attention instead of its keys:

    cost volumes   logits[n, t] = sum_d q[n, d] k[n + shift(t), d], a stack of one product for each
                   shift, and after the softmax a sum of weights[n, t] * v[n + shift(t)]
    skewed chunks  scores of overlapping chunks, whose diagonals become columns by padding and
                   viewing, and the weights back again (Longformer, arXiv 2004.05150)

Both are read backwards in numbers (`movement`): for every logit (n, t) which row of the queries and
which row of the keys it is a product of, for every result which weight meets which value. Where the
query is q[n] for all t, the program is that of gathered keys

    logits[n, t] = sum_d q[n, d] K[n, t, d],   K = gathered_tokens(k),     o = sum_t w[n, t] V[n, t]

and is written so into the functional view, whose local attentions are then read on as any other
(`local_keys`). Logits that are no such product get a key of ones, which only a mask that hides them
allows. Both programs are run on random numbers before one stands for the other. Lengths must be
known, and index tables must not be tensors of the model.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.passes import oracle
from attnopt.passes.analyze.by_value import Values
from attnopt.passes.analyze.local_bases import Space
from attnopt.passes.analyze.movement import Index, Mover, Piece, merged, shape_of, squeezed
from attnopt.passes.analyze.regather_sums import summed
from attnopt.passes.analyze.regather_tokens import LETTERS, Gathered, emit, random_values, tried
from attnopt.passes.normalize import is_tensor, op_name
from attnopt.passes.recognize.axes import Axis
from attnopt.passes.recognize.contraction import Contraction, contraction, sum_of_product
from attnopt.passes.recognize.layout import LAYOUT_OPS
from attnopt.passes.recognize.pointwise import is_cast, is_pointwise
from attnopt.passes.recognize.program import SOFTMAX, UNMOVED, Program
from attnopt.rules import Decline

log = logging.getLogger("attnopt.passes")
aten = torch.ops.aten
#: what stands for a key where a logit is no product of a query and a key
NO_KEY = 1.0


def regathered(program: Program, others: Container[fx.Node] = ()) -> Program:
    """The program with moved scores and weights put back; its view is changed in place.

    others: softmaxes that are of no attention
    """
    changed = False
    for node in program.nodes:
        if node in program.live and node.op == "call_function" and op_name(node) in SOFTMAX \
                and "log" not in op_name(node) and node not in others:
            try:
                changed = _put_back(program, node) or changed
            except (Decline, LookupError) as no:
                log.debug("%s is not put back: %s", node.name, no)
                if isinstance(no, Decline):
                    node.meta[UNMOVED] = no.reason
            except Exception as error:  # what is not understood stays as it is
                log.warning("%s is left as it is: %s", node.name, error,
                            exc_info=log.isEnabledFor(logging.DEBUG))
    return Program(program.view, program.kinds, program.value_of) if changed else program


def _put_back(program: Program, softmax: fx.Node) -> bool:
    source = _moved_scores(program, softmax)
    mover = Mover(Values(program.kinds, program.value_of), program.constant)
    total = summed(program, mover, softmax)
    if source is None and total is None:
        return False
    if not all(isinstance(n, int) for n in shape_of(softmax)):
        raise Decline("a number of tokens that is not known")
    scores = None if source is None else _Scores(program, mover, softmax, source).read()
    if mover.guards:
        raise Decline("an index table of the model")
    for made in (scores, total):
        if made is not None:
            made.try_out()
    for made in (scores, total):
        if made is not None:
            made.put()
    return True


def _moved_scores(program: Program, softmax: fx.Node) -> fx.Node | None:
    """What is moved before the softmax, of which products are the origin; None where they reach it
    by pointwise and layout operations alone. Beside scores that do so, it is a bias."""
    from attnopt.passes.analyze.movement_rules import RULES

    stack, seen = [softmax.args[0]], set[Any]()
    found: fx.Node | None = None
    while stack:
        node = stack.pop()
        if not is_tensor(node) or node in seen:
            continue
        seen.add(node)
        assert isinstance(node, fx.Node)
        if node.op != "call_function" or not program.on_input(node):
            continue
        read = _product(node)
        if read is not None:
            if all(program.on_input(x) for x in (read[0].left, read[0].right)):
                return None
            continue
        name = op_name(node)
        if is_pointwise(node) or is_cast(node):
            stack += node.args
        elif name in LAYOUT_OPS:
            stack.append(node.args[0])
        elif name in RULES and found is None:
            found = node if shape_of(node) == shape_of(softmax) else _widened(node, softmax)
    return found


def _widened(node: fx.Node, softmax: fx.Node) -> fx.Node | None:
    """The layout operation behind `node` whose result has the shape of the logits."""
    for _ in range(8):
        users = [u for u in node.users if u.op == "call_function" and op_name(u) in LAYOUT_OPS]
        if len(users) != 1:
            return None
        node = users[0]
        if shape_of(node) == shape_of(softmax):
            return node
    return None


def _product(node: fx.Node) -> tuple[Contraction, float] | None:
    """A contraction over one axis, and a factor: 1 / n for a mean."""
    found = sum_of_product(node) if op_name(node) == "mean" else contraction(node)
    if found is None or found.addend is not None or len(found.contracted) != 1:
        return None
    (axis,) = found.contracted
    factor = float(found.alpha)
    return found, factor / axis.size if op_name(node) == "mean" else factor


def _factored(node: fx.Node) -> tuple[fx.Node, float]:
    """`node` without factors that are numbers."""
    factor = 1.0
    while node.op == "call_function" and op_name(node) in ("mul", "div") and len(node.args) == 2 \
            and isinstance(node.args[1], int | float) and isinstance(node.args[0], fx.Node):
        factor = factor * node.args[1] if op_name(node) == "mul" else factor / node.args[1]
        node = node.args[0]
    return node, factor


class _Until(Mover):
    """Pulls until a tensor each of whose dimensions is an axis of the space: the queries."""

    def __init__(self, mover: Mover, space: Space) -> None:
        super().__init__(mover.values, mover.constant)
        self.guards, self.space = mover.guards, space
        self.found: tuple[fx.Node, tuple[Axis | None, ...], Tensor] | None = None

    def pull(self, node: fx.Node, index: Index, where: Tensor | None = None) -> list[Piece]:
        assert where is not None
        axes: list[Axis | None] = []
        agree = where
        for x, n in zip(index, shape_of(node), strict=True):
            options: list[tuple[Axis | None, Tensor]] = [] if n != 1 else [(None, where)]
            for a in (a for a in self.space.axes if a.size == n != 1 and a not in axes):
                line = self.space.along((a,))
                if x.shape == line.shape and torch.equal(x, line):
                    options = [(a, where)]
                    break
                options.append((a, where & (x == line)))
            if not options:
                break
            best = options[0] if len(options) == 1 else max(
                options, key=lambda o: self.count(o[1]))
            axes.append(best[0])
            agree = agree & best[1]
        if len(axes) == len(index) and self.space.axes[-1] in axes \
                and 2 * self.count(agree) >= self.count(where) and node.op != "get_attr":
            self.found = node, tuple(axes), agree
            return [Piece(node, index, where)]
        return super().pull(node, index, where)

    def count(self, x: Tensor) -> int:
        return int(x.sum()) * math.prod(a.size for a, n in zip(
            self.space.axes, x.shape, strict=True) if n == 1)


class _Scores:
    """Logits that are moved products, as one product of queries with gathered keys."""

    def __init__(self, program: Program, mover: Mover, softmax: fx.Node, moved: fx.Node) -> None:
        self.program, self.mover, self.moved = program, mover, moved
        self.shape = tuple(shape_of(moved))
        self.dim = softmax.args[1] % len(self.shape)  # type: ignore[operator]

    def read(self) -> _Scores:
        own = [Axis(n) for n in self.shape]
        space = Space(tuple(own))
        index = tuple(space.along((a,)) for a in own)
        found = []
        for piece in self.mover.pull(self.moved, index):
            if piece.node is None:
                continue
            node, factor = _factored(piece.node)
            read = _product(node)
            if read is None:
                raise Decline("scores that are moved with what is no score", piece.node)
            found.append((piece, read[0], factor * read[1]))
        if not found or len({f for _, _, f in found}) != 1:
            raise Decline("moved scores of several scales", self.moved)
        self.factor = found[0][2]
        for queries in (0, 1):
            if self._as(own, found, queries):
                return self
        raise Decline("moved scores whose queries are not one row each", self.moved)

    def _as(self, own: list[Axis], found: Sequence[tuple[Piece, Contraction, float]],
            queries: int) -> bool:
        """Read operand `queries` of every product as the queries, the other one as keys."""
        keys: list[Piece] = []
        proper = None
        alike: list[fx.Node] = []
        held: dict[Any, tuple[fx.Node, tuple[Axis | None, ...]]] = {}
        features = {next(iter(c.contracted)).size for _, c, _ in found}
        if len(features) != 1:
            return False
        feature = Axis(features.pop())
        space = Space((*own, feature))
        for piece, read, _ in found:
            sides = _operands(piece, read, space.along((feature,)))
            where = piece.where.unsqueeze(-1)
            until = _Until(self.mover, space)
            until.pull(sides[queries][0], sides[queries][1], where)
            if until.found is None:
                return False
            node, axes, agree = until.found
            held.setdefault((_text(node), axes), (node, axes))
            alike.append(node)
            agree = agree.all(-1, keepdim=True)
            proper = agree if proper is None else proper | agree
            keys += self.mover.pull(*sides[1 - queries], agree)
        (node, axes), *others = held.values()
        if others or own[self.dim] in axes or proper is None:
            return False
        joined = merged(keys)
        tensors = [p for p in joined if p.node is not None]
        if len(tensors) != 1 or node.meta["val"].dtype != self.moved.meta["val"].dtype:
            return False
        fills = [(p.where, p.value) for p in joined if p.node is None]
        proper = proper.expand([a.size if n > 1 else 1 for a, n in zip(
            space.axes, proper.shape, strict=True)])
        if not bool(proper.all()):
            fills.append((~proper, NO_KEY))
        self.node, self.axes, self.space, self.proper = node, axes, space, proper
        self.key, self.alike = tensors[0], alike
        self.gathered = Gathered(tuple(map(squeezed, self.key.index)),
                                 tuple(fills), tuple(a.size for a in space.axes))
        return True

    def equation(self) -> str:
        letters = dict(zip(self.space.axes, LETTERS, strict=False))
        spare = iter(LETTERS[len(letters):])
        query = "".join(next(spare) if a is None else letters[a] for a in self.axes)
        key = "".join(letters.values())
        return f"{query},{key}->{key[:-1]}"

    def try_out(self) -> None:
        tried(self.gathered, self.moved)
        assert self.key.node is not None
        known = random_values(self.node, self.key.node)
        q, k = known[self.node], known[self.key.node]
        known |= dict.fromkeys(self.alike, q)
        mine = torch.einsum(self.equation(), q, self.gathered(k)) * self.factor
        author = oracle.run(self.moved, known, precise=True)
        proper = self.proper.squeeze(-1).expand(author.shape)
        torch.testing.assert_close(mine[proper], author[proper])

    def put(self) -> None:
        view = self.program.view
        assert self.key.node is not None
        with view.graph.inserting_before(self.moved):
            keys = emit(view, self.gathered, (self.key.node,), self.key.node, self.gathered.shape,
                        self.moved)
            made = emit(view, aten.einsum.default, (self.equation(), [self.node, keys]),
                        self.moved, self.shape, self.moved)
            if self.factor != 1:
                made = emit(view, aten.mul.Tensor, (made, self.factor), self.moved, self.shape,
                            self.moved)
        self.moved.replace_all_uses_with(made)


def _text(node: fx.Node) -> str:
    """The same for nodes that are made alike: a view that is taken for each displacement."""
    if node.op != "call_function" or op_name(node) not in LAYOUT_OPS:
        return node.name
    return f"{node.target}({', '.join(_text(a) if is_tensor(a) else str(a) for a in node.args)})"


def _operands(piece: Piece, read: Contraction, feature: Tensor
              ) -> list[tuple[fx.Node, Index]]:
    """Both operands of a product with the index of each at the elements of `piece`."""
    (contracted,) = read.contracted
    place = {dim[0]: x.unsqueeze(-1) for dim, x in zip(read.out_layout, piece.index, strict=True)
             if dim}
    place[contracted] = feature
    none = torch.zeros_like(feature[..., :1])
    return [(node, tuple(place[dim[0]] if dim else none for dim in layout))
            for node, layout in ((read.left, read.left_layout), (read.right, read.right_layout))]
