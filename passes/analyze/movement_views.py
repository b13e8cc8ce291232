"""Movement rules of ops whose every element is one element of their argument: views, slices, rolls.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, fx

from attnopt.passes.analyze.lift import Bound, bind
from attnopt.passes.analyze.movement import (
    Index,
    Mover,
    Piece,
    Unmoved,
    checked,
    from_end,
    number,
    put,
    reshaped,
    shape_of,
    squeezed,
    zero,
)
from attnopt.passes.normalize import op_name
from attnopt.passes.recognize.axes import same_length

Rule = Callable[[Mover, fx.Node, Bound, Index, Tensor], list[Piece]]


def _plain(change: Callable[[fx.Node, Bound, Index], Index]) -> Rule:
    """A rule for an op whose every element is an element of its first argument."""
    def rule(m: Mover, node: fx.Node, a: Bound, index: Index, where: Tensor) -> list[Piece]:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if source.meta["val"].dtype != node.meta["val"].dtype \
                or source.meta["val"].device != node.meta["val"].device:
            raise Unmoved(f"a conversion to {node.meta['val'].dtype}")
        return m.pull(source, change(node, a, index), where)
    return rule


def _view(node: fx.Node, a: Bound, index: Index) -> Index:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return reshaped(index, shape_of(node), shape_of(source))


def _permute(node: fx.Node, a: Bound, index: Index) -> Index:
    order = [d % len(index) for d in a.dims]
    return tuple(index[order.index(i)] for i in range(len(index)))


def _transpose(node: fx.Node, a: Bound, index: Index) -> Index:
    given = [a.values.get(n) for n in ("dim0", "dim1", "axis0", "axis1")]
    i, j = [d for d in given if d is not None] or ([-2, -1] if len(index) > 1 else [0, 0])
    found = list(index)
    found[i], found[j] = found[j], found[i]
    return tuple(found)


def _movedim(node: fx.Node, a: Bound, index: Index) -> Index:
    probe = torch.empty(tuple(range(1, len(index) + 1)), device="meta")
    moved = list(torch.movedim(probe, a.source, a.destination).shape)
    return tuple(index[moved.index(n)] for n in probe.shape)


def _expand(node: fx.Node, a: Bound, index: Index) -> Index:
    shape = shape_of(a.self)
    own = index[len(index) - len(shape):]
    return tuple(zero(index) if n == 1 else i for n, i in zip(shape, own, strict=True))


def _repeat(node: fx.Node, a: Bound, index: Index) -> Index:
    shape, new = shape_of(a.self), shape_of(node)[len(index) - a.self.meta["val"].dim():]
    own = index[len(index) - len(shape):]
    return tuple(zero(index) if n == 1 else i if same_length(n, m) else squeezed(i % number(n))
                 for n, m, i in zip(shape, new, own, strict=True))


def _repeat_interleave(node: fx.Node, a: Bound, index: Index) -> Index:
    if not isinstance(a.repeats, int) or a.get("dim") is None:
        raise Unmoved("repeats that differ")
    dim = a.dim % len(index)
    return put(index, dim, squeezed(index[dim] // a.repeats))


def _slice(node: fx.Node, a: Bound, index: Index) -> Index:
    dim = a.get("dim", 0) % len(index)
    n = shape_of(a.self)[dim]
    start = 0 if a.values.get("start") is None else from_end(a.start, n)
    return put(index, dim, start + index[dim] * number(a.get("step", 1)))


def _narrow(node: fx.Node, a: Bound, index: Index) -> Index:
    dim = a.dim % len(index)
    return put(index, dim, from_end(a.start, shape_of(a.self)[dim]) + index[dim])


def _select(node: fx.Node, a: Bound, index: Index) -> Index:
    dim = a.get("dim", 0) % (len(index) + 1)
    at = from_end(a.index, shape_of(a.self)[dim])
    return (*index[:dim], zero(index) + at, *index[dim:])


def _unfold(node: fx.Node, a: Bound, index: Index) -> Index:
    dim = a.dimension % max(len(index) - 1, 1)
    return put(index[:-1], dim, checked(index[dim] * number(a.step) + index[-1]))


def _diagonal(node: fx.Node, a: Bound, index: Index) -> Index:
    rank = len(index) + 1
    first, second = a.dim1 % rank, a.dim2 % rank
    rest = iter(index[:-1])
    return tuple(index[-1] + max(-a.offset, 0) if d == first
                 else index[-1] + max(a.offset, 0) if d == second else next(rest)
                 for d in range(rank))


def _flip(node: fx.Node, a: Bound, index: Index) -> Index:
    dims = [d % len(index) for d in a.dims]
    return tuple(number(n) - 1 - i if d in dims else i
                 for d, (n, i) in enumerate(zip(shape_of(node), index, strict=True)))


def _roll(node: fx.Node, a: Bound, index: Index) -> Index:
    if not a.dims:
        raise Unmoved("rolled over all dimensions at once")
    found = list(index)
    for shift, dim in zip(a.shifts, a.dims, strict=True):
        found[dim] = (found[dim] - number(shift)) % number(shape_of(node)[dim])
    return tuple(found)


def _as_strided(m: Mover, node: fx.Node, a: Bound, index: Index, where: Tensor) -> list[Piece]:
    source = a.self.meta["val"]
    shape = [number(n) for n in source.shape]
    steps = [number(n) for n in source.stride()]
    held = sorted((i for i, n in enumerate(shape) if n != 1), key=lambda i: -steps[i])
    if [steps[i] for i in held] != [math.prod(shape[j] for j in held[at + 1:])
                                    for at, i in enumerate(held)]:
        raise Unmoved("strides into a tensor that is not dense")
    offset = a.values.get("storage_offset")
    flat = zero(index) + (0 if offset is None else number(offset) - int(source.storage_offset()))
    for i, stride in zip(index, a.stride, strict=True):
        flat = checked(flat + i * number(stride))
    if bool((((flat < 0) | (flat >= math.prod(shape))) & where).any()):
        raise Unmoved("strides beyond the tensor")
    places = tuple(squeezed(flat // step % n) if n != 1 else zero(index)
                   for n, step in zip(shape, steps, strict=True))
    return m.pull(a.self, places, where)


def _getitem(m: Mover, node: fx.Node, a: Bound, index: Index, where: Tensor) -> list[Piece]:
    parts, place = node.args
    assert isinstance(parts, fx.Node) and isinstance(place, int)
    name, given = op_name(parts), bind(parts)
    source = parts.args[0]
    assert isinstance(source, fx.Node)
    if name == "unbind":
        dim = given.get("dim", 0) % (len(index) + 1)
        return m.pull(source, (*index[:dim], zero(index) + place, *index[dim:]), where)
    if name not in ("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split",
                    "unsafe_chunk", "unsafe_split_with_sizes"):
        raise Unmoved(f"a result of {name}")
    dim = given.get("dim", 0) % len(index)
    before = sum(number(p.shape[dim]) for p in parts.meta["val"][:place])
    return m.pull(source, put(index, dim, before + index[dim]), where)


_VIEW = _plain(_view)
_SAME = _plain(lambda node, a, index: index)
VIEWS: dict[str, Rule] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "ravel",
                     "view_as", "reshape_as", "unsqueeze", "squeeze"), _VIEW),
    **dict.fromkeys(("clone", "contiguous", "alias", "lift_fresh", "positive", "to", "_to_copy",
                     "type_as", "float"), _SAME),
    **dict.fromkeys(("transpose", "t", "mT", "swapaxes", "swapdims"), _plain(_transpose)),
    **dict.fromkeys(("movedim", "moveaxis"), _plain(_movedim)),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _plain(_expand)),
    **dict.fromkeys(("repeat", "tile"), _plain(_repeat)),
    "permute": _plain(_permute), "repeat_interleave": _plain(_repeat_interleave),
    "slice": _plain(_slice), "narrow": _plain(_narrow), "select": _plain(_select),
    "unfold": _plain(_unfold), "diagonal": _plain(_diagonal), "flip": _plain(_flip),
    "roll": _plain(_roll), "as_strided": _as_strided, "getitem": _getitem,
}
