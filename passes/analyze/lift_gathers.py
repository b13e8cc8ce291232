"""Lifting rules of ops that read or write at computed places: gathers, concatenation, padding,
scatter forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.passes.analyze.lift import Bound, Index, Lifter, Unliftable
from attnopt.passes.analyze.lift_types import cast
from attnopt.passes.analyze.lift_views import put, rank_of, start_of
from attnopt.passes.normalize import op_name

_ZERO = E.const(0)


def _wrapped(lift: Lifter, e: Expr, length: Any) -> Expr:
    """An index tensor's entry, where negative entries count from the end."""
    logic = lift.logic

    def at(x: Expr) -> Expr:
        if logic.nonneg(x):
            return x
        negative = logic.compare("lt", x, _ZERO)
        return logic.choose(negative, logic.add(x, lift.size(length)), x)
    return logic.spread(at, e)


def index(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    """Advanced indexing by integer tensors."""
    places = [i for i, t in enumerate(a.indices) if t is not None]
    if not places:
        return lift.element(a.self, idx)
    tensors = [a.indices[i] for i in places]
    if any(t.meta["val"].dtype in (torch.bool, torch.uint8) for t in tensors):
        raise Unliftable("indexed by a mask")
    rank = max(map(rank_of, tensors))
    # Index tensors with a slice between them put their dimensions first.
    first = places[0] if places == list(range(places[0], places[-1] + 1)) else 0
    own, rest = idx[first : first + rank], iter(idx[:first] + idx[first + rank :])
    shape = a.self.meta["val"].shape
    source = []
    for d in range(len(shape)):
        if d in places:
            entry = lift.operand(a.indices[d], own)
            source.append(_wrapped(lift, entry, shape[d]))
        else:
            source.append(next(rest))
    return _gather(lift, a.self, tuple(source))


def _gather(lift: Lifter, table: fx.Node, idx: Index) -> Expr:
    """table[idx] where an index may be a case tree."""
    return lift.looked_up(table, idx)


def index_select(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    dim = a.dim % len(idx)
    place = lift.operand(a.index, (idx[dim],))
    return _gather(lift, a.self, put(idx, dim, place))


def embedding(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    return _gather(lift, a.weight, (lift.element(a.indices, idx[:-1]), idx[-1]))


def gather(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    if not idx:
        raise Unliftable("gather of a scalar")
    dim = a.dim % len(idx)
    return _gather(lift, a.self, put(idx, dim, lift.element(a.index, idx)))


def take_along_dim(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    """A gather of operands that are broadcast to each other along the other dimensions."""
    if a.get("dim") is None or rank_of(a.self) != len(idx) or rank_of(a.indices) != len(idx):
        raise Unliftable("taken from a flat tensor")
    dim = a.dim % len(idx)
    return _gather(lift, a.self, put(idx, dim, lift.element(a.indices, idx)))


def cat(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    tensors = [t for t in a.tensors if t.meta["val"].shape != (0,)]
    default = {"vstack": 0, "hstack": min(1, len(idx) - 1)}.get(op_name(node), 0)
    if op_name(node) in ("vstack", "hstack") and rank_of(tensors[0]) != len(idx):
        raise Unliftable("stacked with new dimensions")
    dim = a.get("dim", default) % len(idx)
    logic, ends, pieces = lift.logic, _ZERO, []
    for t in tensors:
        start, ends = ends, logic.add(ends, lift.size(t.meta["val"].shape[dim]))
        pieces.append((logic.compare("lt", idx[dim], ends), start, t))

    def element(start: Expr, t: fx.Node) -> Expr:
        e = lift.element(t, put(idx, dim, logic.sub(idx[dim], start)))
        return lift_cast(lift, e, t, node)
    return _first_of(lift, [(c, start, t) for c, start, t in pieces], element)


def _first_of(lift: Lifter, pieces: Sequence[tuple[Expr, Any, Any]], element: Any) -> Expr:
    """The element of the first piece whose condition holds; the last one's does."""
    live = []
    for condition, *rest in pieces:
        if condition is not E.FALSE:
            live.append((condition, rest))
        if condition is E.TRUE:
            break
    result = element(*live[-1][1])
    for condition, rest in reversed(live[:-1]):
        result = lift.logic.choose(condition, element(*rest), result)
    return result


def stack(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    dim = a.get("dim", 0) % len(idx)
    inner = idx[:dim] + idx[dim + 1 :]
    pieces = [(lift.logic.compare("eq", idx[dim], E.const(i)), t, None)
              for i, t in enumerate(a.tensors)]
    return _first_of(lift, pieces,
                     lambda t, _: lift_cast(lift, lift.element(t, inner), t, node))


def pad(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    if a.get("mode", "constant") != "constant":
        raise Unliftable(f"padding by {a.mode}")
    logic, shape, source, inside = lift.logic, lift.shape(a.self), list(idx), E.TRUE
    for n in range(len(a.pad) // 2):
        dim = len(idx) - 1 - n
        source[dim] = logic.sub(source[dim], lift.size(a.pad[2 * n]))
        inside = logic.conj(inside, logic.compare("le", _ZERO, source[dim]),
                            logic.compare("lt", source[dim], shape[dim]))
    outside = lift_cast(lift, E.wrap(lift.number(a.get("value", 0))), None, node)
    if inside is E.FALSE:
        return outside
    return logic.choose(inside, lift.element(a.self, tuple(source)), outside)


def slice_scatter(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    logic, dim = lift.logic, a.dim % len(idx)
    length = a.self.meta["val"].shape[dim]
    start = _ZERO if a.start is None else start_of(lift, a.start, length)
    end = lift.size(length) if a.end is None else start_of(lift, a.end, length)
    offset, step = logic.sub(idx[dim], start), lift.size(a.step)
    inside = logic.conj(
        logic.compare("le", start, idx[dim]), logic.compare("lt", idx[dim], end),
        logic.compare("eq", logic.mod(offset, step), _ZERO))
    return _written(lift, inside, a.src, put(idx, dim, logic.floordiv(offset, step)), a.self,
                    idx, node)


def _written(lift: Lifter, inside: Expr, source: fx.Node, source_idx: Index, base: fx.Node,
             idx: Index, node: fx.Node) -> Expr:
    """`source` where inside, else what `base` held; neither is read where it does not matter."""
    if inside is E.FALSE:
        return lift.element(base, idx)
    new = lift_cast(lift, lift.element(source, source_idx), source, node)
    return new if inside is E.TRUE else lift.logic.choose(inside, new, lift.element(base, idx))


def select_scatter(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    dim = a.dim % len(idx)
    at = start_of(lift, a.index, a.self.meta["val"].shape[dim])
    inside = lift.logic.compare("eq", idx[dim], at)
    return _written(lift, inside, a.src, idx[:dim] + idx[dim + 1 :], a.self, idx, node)


def diagonal_scatter(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    first, second = a.dim1 % len(idx), a.dim2 % len(idx)
    inside = lift.logic.compare(
        "eq", lift.logic.add(idx[first], E.const(a.offset)), idx[second])
    along = idx[first] if a.offset >= 0 else idx[second]
    rest = tuple(i for d, i in enumerate(idx) if d not in (first, second))
    return _written(lift, inside, a.src, (*rest, along), a.self, idx, node)


def copy(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    return lift_cast(lift, lift.operand(a.src, idx), a.src, node)


def lift_cast(lift: Lifter, e: Expr, source: fx.Node | None, node: fx.Node) -> Expr:
    """`e`, an element of `source` (or a number), in the type of `node`."""
    return cast(lift, e, source.meta["val"].dtype if source is not None else None,
                node.meta["val"].dtype)


GATHERS = {
    **dict.fromkeys(("cat", "concat", "concatenate", "hstack", "vstack"), cat),
    **dict.fromkeys(("constant_pad_nd", "pad"), pad),
    "index": index, "index_select": index_select, "embedding": embedding, "gather": gather,
    "take_along_dim": take_along_dim, "stack": stack, "slice_scatter": slice_scatter,
    "select_scatter": select_scatter, "diagonal_scatter": diagonal_scatter, "copy": copy,
}
