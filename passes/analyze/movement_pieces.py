"""Movement rules of ops whose elements come from several places: padding, concatenation, F.unfold,
gathers with an index table, selections, assignments into a slice.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from attnopt.passes.analyze.lift import Bound
from attnopt.passes.analyze.movement import (
    Index,
    Mover,
    Piece,
    Unmoved,
    aligned,
    checked,
    from_end,
    number,
    put,
    shape_of,
    squeezed,
)
from attnopt.passes.analyze.movement_views import Rule
from attnopt.passes.normalize import is_tensor, op_name


def _pad(m: Mover, node: fx.Node, a: Bound, index: Index, where: Tensor) -> list[Piece]:
    if a.get("mode", "constant") != "constant":
        raise Unmoved(f"padding by {a.mode}")
    if "pad" in m.ends:
        raise Unmoved("padding")
    shape, inside, source = shape_of(a.self), where, list(index)
    for n in range(len(a.pad) // 2):
        dim = len(index) - 1 - n
        before, after = map(number, a.pad[2 * n : 2 * n + 2])
        if before or after:
            source[dim] = source[dim] - before
            if before > 0:
                inside = inside & (source[dim] >= 0)
            if after > 0:
                inside = inside & (source[dim] < number(shape[dim]))
    value = a.get("value", 0)
    if not isinstance(value, int | float):
        raise Unmoved("padding by what is computed")
    return [*m.pull(a.self, tuple(source), inside), Piece(None, (), where & ~inside, float(value))]


def _im2col(m: Mover, node: fx.Node, a: Bound, index: Index, where: Tensor) -> list[Piece]:
    """F.unfold: (B, C, H, W) -> (B, C * kh * kw, rows * columns of blocks)."""
    (kh, kw), stride, padding, dilation = (
        tuple(map(number, x)) for x in (a.kernel_size, a.stride, a.padding, a.dilation))
    *_, height, width = map(number, shape_of(a.self)[-2:])
    if any(padding) and "pad" in m.ends:
        raise Unmoved("padding")
    blocks = (width + 2 * padding[1] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    inner, block = index[-2:]
    places, given = [], where
    for tap, at, n, s, p, d in ((squeezed(inner // kw % kh), block // blocks, height, stride[0],
                                 padding[0], dilation[0]),
                                (squeezed(inner % kw), block % blocks, width, stride[1],
                                 padding[1], dilation[1])):
        place = squeezed(checked(at * s - p + tap * d))
        if p:
            where = where & (place >= 0) & (place < n)
        places.append(place)
    outside = Piece(None, (), given & ~where, 0.0)
    channel = squeezed(inner // (kh * kw))
    found = m.pull(a.self, (*index[:-2], channel, *places), where)
    return [*found, outside]


def _cat(m: Mover, node: fx.Node, a: Bound, index: Index, where: Tensor) -> list[Piece]:
    dim = a.get("dim", 0) % len(index)
    pieces: list[Piece] = []
    start = 0
    for t in a.tensors:
        if t.meta["val"].shape == (0,):
            continue
        if t.meta["val"].dtype != node.meta["val"].dtype:
            raise Unmoved("tensors of different types joined")
        end = start + number(shape_of(t)[dim])
        here = squeezed((index[dim] >= start) & (index[dim] < end))  # small before it is joined
        if bool(here.any()):
            pieces += m.pull(t, put(index, dim, index[dim] - start), where & here)
        start = end
    return pieces


def _stack(m: Mover, node: fx.Node, a: Bound, index: Index, where: Tensor) -> list[Piece]:
    dim = a.get("dim", 0) % len(index)
    pieces: list[Piece] = []
    for i, t in enumerate(a.tensors):
        own = where & (index[dim] == i)
        if bool(own.any()):
            pieces += m.pull(t, index[:dim] + index[dim + 1 :], own)
    return pieces


def _index(m: Mover, node: fx.Node, a: Bound, index: Index, where: Tensor) -> list[Piece]:
    """Advanced indexing by integer tensors."""
    places = [i for i, t in enumerate(a.indices) if t is not None]
    tensors = [a.indices[i] for i in places]
    if any(t.meta["val"].dtype in (torch.bool, torch.uint8) for t in tensors):
        raise Unmoved("indexed by a mask")
    rank = max((t.meta["val"].dim() for t in tensors), default=0)
    # Index tensors with a slice between them put their dimensions first.
    joined = places == list(range(places[0], places[-1] + 1)) if places else True
    first = places[0] if places and joined else 0
    own, rest = index[first : first + rank], iter(index[:first] + index[first + rank :])
    shape = shape_of(a.self)
    source = []
    for d in range(len(shape)):
        if d not in places:
            source.append(next(rest))
            continue
        table = a.indices[d]
        source.append(_wrapped(m.lookup(table, aligned(own, table)), shape[d]))
    return m.pull(a.self, tuple(source), where)


def _wrapped(place: Tensor, n: object) -> Tensor:
    """Entries of an index tensor, where negative ones count from the end."""
    if bool((place < 0).any()):
        return torch.where(place < 0, place + number(n), place)
    return place


def _index_select(m: Mover, node: fx.Node, a: Bound, index: Index, where: Tensor) -> list[Piece]:
    dim = a.dim % len(index)
    place = m.lookup(a.index, (index[dim],))
    return m.pull(a.self, put(index, dim, place), where)


def _gather(m: Mover, node: fx.Node, a: Bound, index: Index, where: Tensor) -> list[Piece]:
    dim = a.dim % len(index)
    pieces = m.pull(a.index, index)
    if len(pieces) != 1 or pieces[0].node is None:
        raise Unmoved("an index that is joined from several")
    place = m.lookup(pieces[0].node, pieces[0].index)
    return m.pull(a.self, put(index, dim, place), where)


def _where(m: Mover, node: fx.Node, a: Bound, index: Index, where: Tensor) -> list[Piece]:
    """where and masked_fill with a condition that depends on no input."""
    if op_name(node) == "where":
        condition, yes, no = a.condition, a.self, a.other
    else:
        condition, yes, no = a.mask, a.value, a.self
    chosen = m.lookup(condition, aligned(index, condition))
    pieces: list[Piece] = []
    for side, here in ((yes, where & chosen), (no, where & ~chosen)):
        if is_tensor(side):
            if side.meta["val"].dtype != node.meta["val"].dtype:
                raise Unmoved("a choice between types")
            pieces += m.pull(side, aligned(index, side), here)
        elif isinstance(side, int | float):
            pieces.append(Piece(None, (), here, float(side)))
        else:
            raise Unmoved("a choice of what is computed")
    return pieces


def _slice_scatter(m: Mover, node: fx.Node, a: Bound, index: Index, where: Tensor) -> list[Piece]:
    dim = a.get("dim", 0) % len(index)
    n = shape_of(a.self)[dim]
    start = 0 if a.values.get("start") is None else from_end(a.start, n)
    end = number(n) if a.values.get("end") is None else from_end(a.end, n)
    step = number(a.get("step", 1))
    offset = index[dim] - start
    inside = where & (offset >= 0) & (index[dim] < end) & (offset % step == 0)
    return [*m.pull(a.src, put(index, dim, offset // step), inside),
            *m.pull(a.self, index, where & ~inside)]


def _select_scatter(m: Mover, node: fx.Node, a: Bound, index: Index, where: Tensor) -> list[Piece]:
    dim = a.get("dim", 0) % len(index)
    inside = where & (index[dim] == from_end(a.index, shape_of(a.self)[dim]))
    return [*m.pull(a.src, index[:dim] + index[dim + 1 :], inside),
            *m.pull(a.self, index, where & ~inside)]


def _copy(m: Mover, node: fx.Node, a: Bound, index: Index, where: Tensor) -> list[Piece]:
    if a.src.meta["val"].dtype != node.meta["val"].dtype:
        raise Unmoved("a conversion")
    return m.pull(a.src, aligned(index, a.src), where)


def _gathered(m: Mover, node: fx.Node, a: Bound, index: Index, where: Tensor) -> list[Piece]:
    from attnopt.passes.analyze.regather_tokens import rule

    return rule(m, node, index, where)


PIECES: dict[str, Rule] = {
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    **dict.fromkeys(("constant_pad_nd", "pad"), _pad),
    **dict.fromkeys(("where", "masked_fill"), _where),
    "stack": _stack, "im2col": _im2col, "index": _index, "index_select": _index_select,
    "gather": _gather, "slice_scatter": _slice_scatter, "select_scatter": _select_scatter,
    "copy": _copy, "gathered_tokens": _gathered,
}
