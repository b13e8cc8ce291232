"""Lifting rules of ops that move elements: views, slices, gathers, concatenation, scatter forms.

Each rule gives the element of the result at `idx` by the element of an argument at other indices.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.passes.analyze.lift import Bound, Index, Lifter, Unliftable, bind, hint
from attnopt.passes.analyze.relative_shift import unflattened
from attnopt.passes.normalize import op_name

_ZERO = E.const(0)


def rank_of(node: fx.Node) -> int:
    return int(node.meta["val"].dim())


def put(idx: Index, dim: int, value: Expr) -> Index:
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
    pieces = []
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
        pieces.append((flat, old[start:j], sizes[1][start:j]))
    return _at_places(lift, source, pieces)


def _at_places(lift: Lifter, source: fx.Node, pieces: list[tuple[Expr, list[Expr], list[int]]]
               ) -> Expr:
    """The element at row-major places in groups of dimensions: without cases where that can be."""
    def element(cases: bool) -> Expr:
        places = [i for piece in pieces for i in unflattened(lift.logic, *piece, cases)]
        if any(i.op == "where" for i in places):
            return lift.logic.spread(lambda *at: lift.element(source, at), *places)
        return lift.element(source, tuple(places))
    try:
        return element(False)
    except Unliftable:
        if not lift.wraps:
            raise
        return element(True)


#: results of a tensor of their own, whatever their arguments are
_FRESH = ("matmul", "bmm", "mm", "einsum", "cat", "constant_pad_nd", "pad", "clone", "linear")
#: views and copies through which a tensor with that order of elements stays what it is
_SAME = ("contiguous", "view", "reshape", "_unsafe_view", "flatten", "unsqueeze", "alias")


def as_strided(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    """Elements by their place in memory, of a tensor whose order of elements is known."""
    source, logic = a.self, lift.logic
    owner = source
    while owner.op == "call_function" and op_name(owner) in _SAME and isinstance(
            owner.args[0], fx.Node) and owner.meta["val"].is_contiguous():
        owner = owner.args[0]
    plain = [n.meta["val"].is_contiguous() for n in (owner, source)]
    offset = a.get("storage_offset", 0)
    if not all(plain) or owner.op != "call_function" or op_name(owner) not in _FRESH:
        raise Unliftable("strides over memory of unknown order")
    if not isinstance(offset, int) and not _is_size(offset):
        raise Unliftable("starts at a computed place")
    flat = lift.size(offset)
    for i, step in zip(idx, a.stride, strict=True):
        flat = logic.add(flat, logic.mul(i, lift.size(step)))
    lengths = lift.shape(source)
    sizes = [hint(n) for n in source.meta["val"].shape]
    if not logic.nonneg(flat) or not logic.nonneg(logic.sub(
            logic.sub(logic.product(lengths), E.const(1)), flat)):
        raise Unliftable("strides out of its tensor")
    return _at_places(lift, source, [(flat, lengths, sizes)])


def _is_size(x: Any) -> bool:
    return isinstance(x, torch.SymInt) or isinstance(x, fx.Node) and isinstance(
        x.meta.get("val"), int | torch.SymInt)


def start_of(lift: Lifter, position: Any, length: Any) -> Expr:
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
    start = _ZERO if a.start is None else start_of(lift, a.start, length)
    at = lift.logic.add(start, lift.logic.mul(idx[dim], lift.size(a.step)))
    return lift.element(a.self, put(idx, dim, at))


def narrow(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    dim = a.dim % len(idx)
    if isinstance(a.start, fx.Node) and isinstance(a.start.meta["val"], torch.Tensor):
        raise Unliftable("starts at a computed place")
    start = start_of(lift, a.start, a.self.meta["val"].shape[dim])
    return lift.element(a.self, put(idx, dim, lift.logic.add(start, idx[dim])))


def select(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    dim = a.dim % (len(idx) + 1)
    at = start_of(lift, a.index, a.self.meta["val"].shape[dim])
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
    return lift.element(a.self, put(idx[:-1], dim, at))


def getitem(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    """A piece of split, chunk, unbind, meshgrid …"""
    parts, number = node.args
    assert isinstance(parts, fx.Node) and isinstance(number, int)
    name, given = op_name(parts), bind(parts)
    if name == "meshgrid":
        place = number if given.get("indexing", "ij") == "ij" or number > 1 else 1 - number
        tensor = given.tensors[number]
        return lift.element(tensor, (idx[place],) if rank_of(tensor) else ())
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
    return lift.element(parts.args[0], put(idx, dim, at))  # type: ignore[arg-type]


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
    return lift.element(a.self, put(idx, dim, lift.logic.floordiv(
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
    **dict.fromkeys(("repeat", "tile"), repeat),
    **dict.fromkeys(("flip", "fliplr", "flipud"), flip),
    "permute": permute, "unsqueeze": unsqueeze, "squeeze": squeeze, "slice": slice_,
    "narrow": narrow, "select": select, "diagonal": diagonal, "unfold": unfold,
    "getitem": getitem, "repeat_interleave": repeat_interleave, "roll": roll,
    "as_strided": as_strided,
}
