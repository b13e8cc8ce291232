"""What the logits of a local attention are at every cell: query n and place t of its window.

The operands of the logits that vary along the window are masks and biases over cells. One that
depends on no input and has few values splits the cells by value; one that is moved with the keys (a
padding mask or a key-only term that is unfolded too) becomes a case per piece that it is moved
from; any other is a leaf, to be loaded by its own indices. With every case put into the logits the
cells fall into classes, each with one expression:

    visible   the expression that all cells of real keys share
    dropped   -inf, or so low that it underflows beside a key that is surely visible
    sinks     padded places that still take part in the softmax: no key, so that the score is 0
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.passes.analyze.by_value import Values
from attnopt.passes.analyze.local_bases import Base, Space
from attnopt.passes.analyze.local_norms import NORM, is_key_norm
from attnopt.passes.analyze.movement import Index, Mover, Piece, agreed, aligned
from attnopt.passes.analyze.structure import LOW
from attnopt.passes.canonical import Tensor as Placed
from attnopt.passes.normalize import is_tensor, op_name
from attnopt.passes.recognize.axes import Axis, axes_of, settle
from attnopt.passes.recognize.contraction import contraction
from attnopt.passes.recognize.pointwise import POINTWISE, apply, is_cast
from attnopt.rules import Decline

#: values of a table that splits the cells
_FEW = 4
_MOST_CLASSES = 32


@dataclass(frozen=True)
class Leaf:
    """A tensor that is loaded at `index`, one int tensor per dimension.

    levels: its values by cell where it has but two, to be told by the key
    """

    slot: str
    node: fx.Node
    index: Index
    dtype: str
    levels: Tensor | None = None


@dataclass
class Case:
    where: Tensor
    expr: Expr


@dataclass
class Cells:
    """The classes of all cells, as bool tensors over the space of the site.

    finite: something is dropped that is not -inf
    score:  the kind of the score that `logits` is over, where it is not the author's
    """

    visible: Tensor
    logits: Expr
    padded: Tensor
    sink: Expr | None
    finite: bool = False
    score: str = ""
    leaves: dict[str, Leaf] = field(default_factory=dict)
    guards: set[str] = field(default_factory=set)
    passed: set[fx.Node] = field(default_factory=set)


class Operands:
    """Operands over cells, as cases.

    key: the base of the keys, and the index along its features
    """

    def __init__(self, space: Space, mover: Mover, values: Values, cells: frozenset[Axis],
                 key: Base, inner: Tensor) -> None:
        self.space, self.mover, self.values, self.cells = space, mover, values, cells
        self.key, self.inner = key, inner
        self.leaves: dict[str, Leaf] = {}
        self.guards: set[str] = set()
        self.passed: set[fx.Node] = set()

    def cases(self, placed: Placed) -> list[Case]:
        """The cases of an operand."""
        layout = settle(placed.layout)
        index = self.space.index(layout)
        everywhere = torch.ones([1] * len(self.space.axes), dtype=torch.bool)
        return self.read(placed.node, index, everywhere, axes_of(layout) <= self.cells)

    def read(self, node: fx.Node, index: Index, where: Tensor, whole: bool = False) -> list[Case]:
        """The cases of a tensor's elements at `index`."""
        if whole or all(self.space.varies(i) <= self.cells for i in index):
            split = self._split(node, index, where)
            if split is not None:
                return split
        if self.values.sources(node) is not None:
            return [Case(where, self.leaf(node, index))]
        found: list[Case] = []
        for p in self.mover.pull(node, index, where):
            if p.node is None:
                kind = kind_of(node)
                number = bool(p.value) if kind == E.BOOL else (
                    int(p.value) if kind == E.INT else p.value)
                found.append(Case(p.where, E.const(number)))
            elif (other := self._times_ones(p)) is not None:
                found += self.read(*other, p.where)
            elif self._joins(p.node):
                found += self._pointwise(p.node, p.index, p.where)
            elif is_key_norm(self.mover, p.node, p.index, self.inner, self.key.pieces):
                padding = sum(x * x for x in self.key.fill) * self.inner.numel()
                found += [Case(p.where & self.key.where, NORM),
                          Case(p.where & ~self.key.where, E.const(float(padding)))]
            else:
                own = tuple(agreed(x, p.where) for x in p.index)
                found.append(Case(p.where, self.leaf(p.node, own)))
        return found

    def _times_ones(self, p: Piece) -> tuple[fx.Node, Index] | None:
        """What a product with ones over an axis of length one copies (the mask of Longformer)."""
        read = contraction(p.node) if p.node is not None else None
        if read is None or read.addend is not None or read.alpha != 1 or any(
                a.size != 1 for a in read.contracted):
            return None
        place = {dim[0]: x for dim, x in zip(read.out_layout, p.index, strict=True) if dim}
        none = torch.zeros([1] * len(self.space.axes), dtype=torch.int64)
        left, right = ((node, tuple(place.get(dim[0], none) if dim else none for dim in layout))
                       for node, layout in ((read.left, read.left_layout),
                                            (read.right, read.right_layout)))
        for ones, other in ((left, right), (right, left)):
            if all(x.node is None and x.value == 1 for x in self.mover.pull(*ones, p.where)):
                self.passed.add(read.node)
                return other
        return None

    def _split(self, node: fx.Node, index: Index, where: Tensor) -> list[Case] | None:
        """A table of few values, by value."""
        sources = self.values.sources(node)
        if sources is None:
            return None
        try:
            table = self.values.evaluate(node).cpu()
        except LookupError:
            return None
        numbers = table.unique()
        if len(numbers) > _FEW or bool(numbers.isnan().any()):
            return None
        at = table[tuple(i.clamp(0, n - 1) for i, n in zip(index, table.shape, strict=True))] \
            if index else table.reshape([1] * len(self.space.axes))
        self.guards |= sources
        if "pad" in self.mover.ends and len(numbers) == 2 and table.is_floating_point() \
                and numbers.abs().max() < -LOW:
            return [Case(where, self.leaf(node, index, at))]
        return [Case(where & (at == x), E.const(x.item())) for x in numbers]

    def _joins(self, node: fx.Node) -> bool:
        """Is it pointwise, of something that moves?"""
        name = op_name(node) if node.op == "call_function" else ""
        if node.meta.get("attnopt_opaque") or not (name in POINTWISE or is_cast(node)
                                                   or self._truth(node)):
            return False
        return any(self._moves(a) for a in node.args if is_tensor(a))

    def _moves(self, node: object, depth: int = 12) -> bool:
        from attnopt.passes.analyze.movement_pieces import PIECES

        assert isinstance(node, fx.Node)
        if depth == 0 or node.op != "call_function" or node.meta.get("attnopt_opaque"):
            return False
        name = op_name(node)
        if name in PIECES or name in ("unfold", "as_strided", "roll"):
            return True
        from attnopt.passes.analyze.movement_rules import RULES

        passes = name in RULES or name in POINTWISE or name == "sum" or is_cast(node)
        return (passes or self._truth(node)) and any(
            self._moves(a, depth - 1) for a in node.args if is_tensor(a))

    @staticmethod
    def _truth(node: fx.Node) -> bool:
        """A conversion to or from truth values or whole numbers."""
        return node.op == "call_function" and op_name(node) in ("to", "_to_copy", "bool", "float")

    def _pointwise(self, node: fx.Node, index: Index, where: Tensor) -> list[Case]:
        """fn of the cases of the arguments."""
        self.passed.add(node)
        rows: list[tuple[Tensor, list[Expr | object]]] = [(where, [])]
        for a in node.args:
            if not is_tensor(a):
                if isinstance(a, fx.Node):
                    raise Decline("a symbolic number enters the scores", node)
                given = E.const(a) if isinstance(a, bool | int | float) else a
                rows = [(w, [*args, given]) for w, args in rows]
                continue
            assert isinstance(a, fx.Node)
            more = []
            for case in self.read(a, aligned(index, a), where):
                for w, args in rows:
                    both = w & case.where
                    if bool(both.any()):
                        more.append((both, [*args, case.expr]))
            rows = more
            if len(rows) > _MOST_CLASSES:
                raise Decline("a mask of too many parts", node)
        convert = is_cast(node) or self._truth(node)
        return [Case(w, _as_kind(args[0], kind_of(node)) if convert
                     else apply(node, args, dict(node.kwargs))) for w, args in rows]

    def leaf(self, node: fx.Node, index: Index, levels: Tensor | None = None) -> Expr:
        for known in self.leaves.values():
            if known.node is node and len(known.index) == len(index) and all(
                    a.shape == b.shape and torch.equal(a, b)
                    for a, b in zip(known.index, index, strict=True)):
                return E.load(known.slot, dtype=known.dtype)
        slot = f"leaf{len(self.leaves)}"
        self.leaves[slot] = Leaf(slot, node, index, kind_of(node), levels)
        return E.load(slot, dtype=kind_of(node))


def kind_of(node: fx.Node) -> str:
    dtype = node.meta["val"].dtype
    return E.BOOL if dtype == torch.bool else E.FLOAT if dtype.is_floating_point else E.INT


def _as_kind(e: object, kind: str) -> Expr:
    assert isinstance(e, Expr)
    return e if e.dtype == kind else E.call({E.BOOL: "bool", E.INT: "int"}.get(kind, "float"), e)


def classify(logits: Expr, valid: Tensor, cases: Mapping[str, list[Case]], *,
             score_of_padding: float | None,
             row_only: Callable[[Expr], bool]) -> Cells:
    """Split all cells by the expression that the logits are there.

    valid:            where a cell has a key
    cases:            of every operand that varies along the window, by slot
    score_of_padding: the score of a padded key, None where it depends on the query
    row_only:         does an expression load nothing that varies along the window?
    """
    finite = False
    visible, padded = torch.zeros_like(valid), torch.zeros_like(valid)
    shown: Expr | None = None
    sink: Expr | None = None
    for real in (True, False):
        rows: list[tuple[Tensor, dict[Expr, Expr]]] = [(valid if real else ~valid, {})]
        for slot, found in cases.items():
            rows = [(both, {**m, load: c.expr}) for w, m in rows for c in found
                    for load in [_load_of(logits, slot)] if bool((both := w & c.where).any())]
            if len(rows) > _MOST_CLASSES:
                raise Decline("a mask of too many parts")
        for where, put in rows:
            if not bool(where.any()):
                continue
            e = logits.replace(put)
            if dropped(e):
                finite = finite or _fill(e) != -math.inf
            elif real:
                if shown is not None and shown is not e:
                    raise Decline("the logits are not one expression over all neighbours")
                shown, visible = e, visible | where
            else:
                if score_of_padding is not None:
                    e = e.replace({E.score: E.const(score_of_padding)})
                if e.has("score") or not row_only(e) or (sink is not None and sink is not e):
                    raise Decline("padded places take part in the softmax, each in its own way")
                sink, padded = e, padded | where
    if shown is None:
        raise Decline("no neighbour is visible")
    return Cells(visible, shown, padded, sink, finite)


def _load_of(e: Expr, slot: str) -> Expr:
    return next(leaf for leaf in e.leaves if leaf.op == "load" and leaf.value == slot)


def dropped(e: Expr) -> bool:
    """Is the weight of this logit zero beside any finite one?"""
    fill = _fill(e)
    return fill is not None and fill <= LOW


def _fill(e: Expr) -> float | None:
    """The low number that `e` is, or that is added to it; None where there is none."""
    if e.op == "const":
        return float(e.value)
    if e.op in ("add", "sub"):
        parts = [_fill(a) for a in e.args]
        if e.op == "sub" and parts[1] is not None:
            parts[1] = -parts[1]
        return min((p for p in parts if p is not None), default=None)
    if e.op in ("mul", "div") and e.args[1].op == "const" and e.args[1].value > 0:
        inner, factor = _fill(e.args[0]), float(e.args[1].value)
        return None if inner is None else inner * factor if e.op == "mul" else inner / factor
    return None
