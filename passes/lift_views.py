"""Lifting rules of ops that move elements: views, slices, gathers, concatenation, scatter forms.

Each rule gives the element of the result at `idx` by the element of an argument at other indices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.passes.lift import Bound, Index, Lifter, Unliftable, bind, hint
from attnopt.passes.normalize import op_name

_ZERO = E.const(0)


def _rank(node: fx.Node) -> int:
    return int(node.meta["val"].dim())


def _put(idx: Index, dim: int, value: Expr) -> Index:
    return (*idx[:dim], value, *idx[dim + 1 :])


def _insert(idx: Index, dim: int, value: Expr) -> Index:
    return (*idx[:dim], value, *idx[dim:])


def identity(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    return lift.element(node.args[0], idx)  # type: ignore[arg-type]


def dropout(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    if a.train and a.p != 0:
        raise Unliftable("random")
    return lift.element(a.input, idx)


def broadcast(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    return lift.operand(a.self, idx)


def unsqueeze(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    dim = a.dim % len(idx)
    return lift.element(a.self, idx[:dim] + idx[dim + 1 :])


def squeeze(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    shape = a.self.meta["val"].shape
    dims = a.get("dim", range(len(shape)))
    dims = {d % len(shape) for d in ((dims,) if isinstance(dims, int) else dims)}
    rest = iter(idx)
    return lift.element(a.self, tuple(
        _ZERO if d in dims and n == 1 else next(rest) for d, n in enumerate(shape)))


def permute(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    source: list[Expr] = [_ZERO] * len(idx)
    for i, d in enumerate(a.dims):
        source[d % len(idx)] = idx[i]
    return lift.element(a.self, tuple(source))


def transpose(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    given = [a.values.get(n) for n in ("dim0", "dim1", "axis0", "axis1")]
    dims = [d for d in given if d is not None] or ([-2, -1] if len(idx) > 1 else [0, 0])
    if op_name(node) == "numpy_T" and len(idx) > 2:
        raise Unliftable("reverses all dimensions")
    source = list(idx)
    i, j = dims
    source[i], source[j] = source[j], source[i]
    return lift.element(a.self, tuple(source))


def movedim(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    rank = len(idx)
    pair = [((x,) if isinstance(x, int) else x) for x in (a.source, a.destination)]
    moved = {d % rank: s % rank for s, d in zip(*pair, strict=True)}
    rest = iter(d for d in range(rank) if d not in moved.values())
    order = [moved[d] if d in moved else next(rest) for d in range(rank)]
    source: list[Expr] = [_ZERO] * rank
    for i, d in enumerate(order):
        source[d] = idx[i]
    return lift.element(a.self, tuple(source))


def view(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    """Dimensions are matched in the smallest groups of equal product, so that a symbolic length
    is divided by only where it is really split."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if node.meta["val"].dtype != source.meta["val"].dtype:
        raise Unliftable("a view as another type")
    logic = lift.logic
    new, old = lift.shape(node), lift.shape(source)
    sizes = [[hint(n) for n in x.meta["val"].shape] for x in (node, source)]
    if 0 in sizes[0]:
        raise Unliftable("an empty tensor")
    made: list[Expr] = []
    i = j = 0
    while i < len(new) or j < len(old):
        first, start = i, j
        i, j = min(i + 1, len(new)), min(j + 1, len(old))
        while (n := math.prod(sizes[0][first:i])) != (m := math.prod(sizes[1][start:j])) \
                or logic.product(new[first:i]) is not logic.product(old[start:j]):
            if (n <= m or j == len(old)) and i < len(new):
                i += 1
            elif j < len(old):
                j += 1
            else:
                raise Unliftable("lengths whose products do not match")
        flat = _ZERO
        for d in range(first, i):
            flat = logic.add(logic.mul(flat, new[d]), idx[d] if sizes[0][d] != 1 else _ZERO)
        parts = []
        for d in range(j - 1, start - 1, -1):
            outermost = all(n == 1 for n in sizes[1][start:d])
            parts.append(flat if outermost else logic.mod(flat, old[d]))
            flat = _ZERO if outermost else logic.floordiv(flat, old[d])
        made.extend(reversed(parts))
    return lift.element(source, tuple(made))


def _start(lift: Lifter, position: Any, length: Any) -> Expr:
    """A slice position as torch reads it: counted from the end if negative, within the length."""
    at, end = hint(position), hint(length)
    if at >= end:
        return lift.size(length)
    if at < 0:
        return lift.logic.add(lift.size(length), lift.size(position)) if at >= -end else _ZERO
    start = lift.size(position)
    lift.logic.assume(start)
    return start


def slice_(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    dim = a.dim % len(idx)
    length = a.self.meta["val"].shape[dim]
    start = _ZERO if a.start is None else _start(lift, a.start, length)
    at = lift.logic.add(start, lift.logic.mul(idx[dim], lift.size(a.step)))
    return lift.element(a.self, _put(idx, dim, at))


def narrow(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    dim = a.dim % len(idx)
    if isinstance(a.start, fx.Node) and isinstance(a.start.meta["val"], torch.Tensor):
        raise Unliftable("starts at a computed place")
    start = _start(lift, a.start, a.self.meta["val"].shape[dim])
    return lift.element(a.self, _put(idx, dim, lift.logic.add(start, idx[dim])))


def select(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    dim = a.dim % (len(idx) + 1)
    at = _start(lift, a.index, a.self.meta["val"].shape[dim])
    return lift.element(a.self, _insert(idx, dim, at))


def diagonal(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    rank = len(idx) + 1
    first, second = a.dim1 % rank, a.dim2 % rank
    i = lift.logic.add(idx[-1], E.const(max(-a.offset, 0)))
    j = lift.logic.add(idx[-1], E.const(max(a.offset, 0)))
    rest = iter(idx[:-1])
    return lift.element(a.self, tuple(
        i if d == first else j if d == second else next(rest) for d in range(rank)))


def unfold(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    dim = a.dimension % max(len(idx) - 1, 1)
    at = lift.logic.add(lift.logic.mul(idx[dim], lift.size(a.step)), idx[-1])
    return lift.element(a.self, _put(idx[:-1], dim, at))


def getitem(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    """A piece of split, chunk, unbind, meshgrid …"""
    parts, number = node.args
    assert isinstance(parts, fx.Node) and isinstance(number, int)
    name, given = op_name(parts), bind(parts)
    if name == "meshgrid":
        place = number if given.get("indexing", "ij") == "ij" or number > 1 else 1 - number
        tensor = given.tensors[number]
        return lift.element(tensor, (idx[place],) if _rank(tensor) else ())
    if name == "broadcast_tensors":
        return lift.operand(given.tensors[number], idx)
    if name == "unbind":
        return lift.element(given.self, _insert(idx, given.dim % (len(idx) + 1), E.const(number)))
    if name not in ("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split",
                    "unsafe_chunk", "unsafe_split_with_sizes"):
        raise Unliftable(f"a result of {name}")
    dim = given.dim % len(idx)
    before = [lift.size(p.shape[dim]) for p in parts.meta["val"][:number]]
    at = lift.logic.sum((*before, idx[dim]))
    return lift.element(parts.args[0], _put(idx, dim, at))  # type: ignore[arg-type]


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
    rank = max(map(_rank, tensors))
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
    return lift.logic.spread(lambda *places: lift.element(table, places), *idx)


def index_select(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    dim = a.dim % len(idx)
    place = lift.operand(a.index, (idx[dim],))
    return _gather(lift, a.self, _put(idx, dim, place))


def embedding(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    return _gather(lift, a.weight, (lift.element(a.indices, idx[:-1]), idx[-1]))


def gather(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    if not idx:
        raise Unliftable("gather of a scalar")
    dim = a.dim % len(idx)
    return _gather(lift, a.self, _put(idx, dim, lift.element(a.index, idx)))


def cat(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    tensors = [t for t in a.tensors if t.meta["val"].shape != (0,)]
    default = {"vstack": 0, "hstack": min(1, len(idx) - 1)}.get(op_name(node), 0)
    if op_name(node) in ("vstack", "hstack") and _rank(tensors[0]) != len(idx):
        raise Unliftable("stacked with new dimensions")
    dim = a.get("dim", default) % len(idx)
    logic, ends, pieces = lift.logic, _ZERO, []
    for t in tensors:
        start, ends = ends, logic.add(ends, lift.size(t.meta["val"].shape[dim]))
        pieces.append((logic.compare("lt", idx[dim], ends), start, t))

    def element(start: Expr, t: fx.Node) -> Expr:
        e = lift.element(t, _put(idx, dim, logic.sub(idx[dim], start)))
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


def repeat(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    shape = a.self.meta["val"].shape
    own = idx[len(idx) - len(shape) :]
    return lift.element(a.self, tuple(
        _ZERO if n == 1 else lift.logic.mod(i, lift.size(n))
        for n, i in zip(shape, own, strict=True)))


def repeat_interleave(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    if not isinstance(a.repeats, int) or a.get("dim") is None:
        raise Unliftable("repeats that differ")
    dim = a.dim % len(idx)
    return lift.element(a.self, _put(idx, dim, lift.logic.floordiv(
        idx[dim], E.const(a.repeats))))


def flip(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    dims = [d % len(idx) for d in a.get("dims", {"fliplr": [1], "flipud": [0]}.get(
        op_name(node), []))]
    shape = a.self.meta["val"].shape
    return lift.element(a.self, tuple(
        lift.logic.sub(lift.logic.sub(lift.size(n), E.const(1)), i) if d in dims else i
        for d, (n, i) in enumerate(zip(shape, idx, strict=True))))


def roll(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    if not a.dims:
        raise Unliftable("rolled over all dimensions at once")
    shape, source = a.self.meta["val"].shape, list(idx)
    for shift, dim in zip(a.shifts, a.dims, strict=True):
        moved = lift.logic.sub(source[dim], lift.size(shift))
        source[dim] = lift.logic.mod(moved, lift.size(shape[dim]))
    return lift.element(a.self, tuple(source))


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
    start = _ZERO if a.start is None else _start(lift, a.start, length)
    end = lift.size(length) if a.end is None else _start(lift, a.end, length)
    offset, step = logic.sub(idx[dim], start), lift.size(a.step)
    inside = logic.conj(
        logic.compare("le", start, idx[dim]), logic.compare("lt", idx[dim], end),
        logic.compare("eq", logic.mod(offset, step), _ZERO))
    return _written(lift, inside, a.src, _put(idx, dim, logic.floordiv(offset, step)), a.self,
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
    at = _start(lift, a.index, a.self.meta["val"].shape[dim])
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
    from attnopt.passes.lift_values import cast

    return cast(lift, e, source.meta["val"].dtype if source is not None else None,
                node.meta["val"].dtype)


VIEWS = {
    **dict.fromkeys(("clone", "contiguous", "alias", "detach", "lift_fresh", "lift_fresh_copy",
                     "positive", "resolve_conj", "resolve_neg"), identity),
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout"), dropout),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), broadcast),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "ravel",
                     "view_as", "reshape_as"), view),
    **dict.fromkeys(("transpose", "t", "mT", "numpy_T", "swapaxes", "swapdims", "adjoint"),
                    transpose),
    **dict.fromkeys(("movedim", "moveaxis"), movedim),
    **dict.fromkeys(("cat", "concat", "concatenate", "hstack", "vstack"), cat),
    **dict.fromkeys(("repeat", "tile"), repeat),
    **dict.fromkeys(("flip", "fliplr", "flipud"), flip),
    **dict.fromkeys(("constant_pad_nd", "pad"), pad),
    "permute": permute, "unsqueeze": unsqueeze, "squeeze": squeeze, "slice": slice_,
    "narrow": narrow, "select": select, "diagonal": diagonal, "unfold": unfold,
    "getitem": getitem, "index": index, "index_select": index_select, "embedding": embedding,
    "gather": gather, "stack": stack, "repeat_interleave": repeat_interleave, "roll": roll,
    "slice_scatter": slice_scatter, "select_scatter": select_scatter,
    "diagonal_scatter": diagonal_scatter, "copy": copy,
}
