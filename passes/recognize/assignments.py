"""Assignments into a part of the scores: numbers, and a block made of the scores that it replaces.

    x[..., i] = number     x[..., a:b] = number     x[mask] = number
    x[..., a:, b:] = x[..., a:, b:] + bias

The last is how a bias of image tokens leaves class tokens alone (MViTv2, arXiv 2112.01526). A block
has axes of its own, of which it is known where in the axes of the scores they lie: a `Part`. What
is read in it is an operand that is 0 elsewhere, and the whole is x + that operand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.passes.normalize import is_tensor, op_name
from attnopt.passes.recognize.axes import (
    Axis,
    Layout,
    axes_of,
    product,
    resolve,
    same_length,
    settle,
    shape_of,
)
from attnopt.rules import Decline

if TYPE_CHECKING:
    from attnopt.passes.recognize.reader import Reader

#: what a slice without an end has for one
_END = 2**62


@dataclass(frozen=True, eq=False)
class Part:
    """An axis that is the places `start`, `start` + 1, … of the axes `of`, a dimension of scores.
    """

    axis: Axis
    of: tuple[Axis, ...]
    start: int

    @property
    def axes(self) -> frozenset[Axis]:
        """The axis, or those that it turned out to be made of."""
        return frozenset(resolve((self.axis,)))


def whole(layout: Layout, parts: tuple[Part, ...]) -> Layout:
    """A layout with what the parts are of in their place, one dimension for each."""
    inside = frozenset[Axis]().union(*(p.axes for p in parts))
    rest = tuple(tuple(a for a in dim if a not in inside) for dim in settle(layout))
    return (*rest, *(p.of for p in parts))


def scatter(reader: Reader, node: fx.Node, layout: Layout) -> Expr:
    """select_scatter, slice_scatter: a number along the keys, or a block."""
    base, source, dim, *where = node.args
    assert isinstance(source, fx.Node) and isinstance(dim, int)
    if op_name(node) == "slice_scatter" and _same_along(base, source, dim):
        return reader.read(source, layout)
    number = reader.program.constant(source)
    if number is None and op_name(source) in ("fill", "copy"):
        filler = source.args[1]
        number = reader.program.constant(filler) if isinstance(filler, fx.Node) else filler
    if number is None:
        return _block(reader, node, layout)
    if frozenset(resolve(layout[dim])) != reader.keys or len(reader.keys) != 1:
        raise Decline("an assignment along another axis than the keys", node)
    size = layout[dim][0].size
    if not isinstance(size, int) and not all(isinstance(w, int) and w >= 0 for w in where):
        raise Decline("an assignment of a tensor into the scores", node)
    if op_name(node) == "select_scatter":
        start = where[0] if where[0] >= 0 else where[0] + size  # type: ignore[operator]
        start, stop, step = start, start + 1, 1  # type: ignore[operator]
    else:
        bounds = slice(*(*where[:2], *(where[2:] or [1])))
        start, stop, step = bounds.indices(size if isinstance(size, int) else _END)
    if step != 1:
        raise Decline("an assignment with a step into the scores", node)
    k = E.index("k")
    inside = (E.const(start) <= k) & (k < E.const(stop))
    return E.where(inside, number, reader.read(base, layout))


def masked(reader: Reader, node: fx.Node, layout: Layout) -> Expr:
    """x[mask] = value, with a boolean mask over the leading dimensions of x."""
    base, places, source, *accumulate = node.args
    if len(places) != 1 or any(accumulate) or not is_tensor(places[0]):  # type: ignore
        raise Decline("an indexed assignment into the scores", node)
    mask: fx.Node = places[0]  # type: ignore[index,assignment]
    number = reader.program.constant(source)  # type: ignore[arg-type]
    if mask.meta["val"].dtype != torch.bool or number is None:
        raise Decline("an indexed assignment into the scores", node)
    condition = reader.read(mask, layout[: mask.meta["val"].dim()])
    return E.where(condition, number, reader.read(base, layout))


# -- blocks ---------------------------------------------------------------------------------------
def _block(reader: Reader, node: fx.Node, layout: Layout) -> Expr:
    """x[start:] = source along one dimension."""
    base, source, dim = node.args[:3]
    assert isinstance(source, fx.Node) and isinstance(dim, int)
    dim %= len(layout)
    of = resolve(layout[dim])
    start = _start(node)
    if op_name(node) != "slice_scatter" or reader.of_weights or start is None or not of:
        raise Decline("an assignment of a tensor into the scores", node)
    keys = frozenset(of) == reader.keys
    if keys and len(of) != 1:
        raise Decline("an assignment of a tensor into keys of several axes", node)
    if not keys:  # they must turn out to be the queries
        reader.triangles.append((of, node))
    part = _part(reader, of, start)
    dims = (*layout[:dim], (part.axis,), *layout[dim + 1:])
    inner, outer = reader.read(source, dims), reader.read(base, layout)
    inside = E.const(start) <= E.index("k" if keys else "q")
    more = _beyond(inner, outer)
    if more is None:
        return E.where(inside, inner, outer)
    for term in more:
        outer = outer + (term if _ends(reader, term, part) else E.where(inside, term, 0.0))
    return outer


def behind_slice(reader: Reader, node: fx.Node, layout: Layout) -> tuple[fx.Node, Layout] | None:
    """What a slice that takes a known part is taken of, with its layout."""
    source, dim = node.args[:2]
    assert isinstance(source, fx.Node) and isinstance(dim, int)
    dim %= len(layout)
    axes = resolve(layout[dim])
    for part in reader.parts:
        if axes and axes == resolve((part.axis,)) and _start(node) == part.start \
                and same_length(shape_of(source.meta["val"])[dim], product(part.of)):
            return source, (*layout[:dim], part.of, *layout[dim + 1:])
    return None


def overwritten(node: fx.Node) -> list[fx.Node]:
    """The views through which a fill or copy reaches what it writes."""
    found = []
    at = node.args[0]
    while isinstance(at, fx.Node) and op_name(at) in ("slice", "select"):
        found.append(at)
        at = at.args[0]
    return found


def _part(reader: Reader, of: tuple[Axis, ...], start: int) -> Part:
    for part in reader.parts:
        if resolve(part.of) == of and part.start == start:
            return part
    part = Part(Axis(product(of) - start), of, start)
    reader.parts.append(part)
    return part


def _start(node: fx.Node) -> int | None:
    """Where a slice, or what is put back for it, starts; None where it does not go to the end."""
    name = op_name(node)
    source = node.args[0]
    dim, *bounds = node.args[1 if name == "slice" else 2:]
    assert isinstance(source, fx.Node) and isinstance(dim, int)
    start, stop, step = [*bounds, None, None, None][:3]
    size = shape_of(source.meta["val"])[dim]
    start = 0 if start is None else start
    ends = stop is None or (stop >= size if isinstance(stop, int) and isinstance(size, int)
                            else isinstance(stop, int) and stop >= _END)
    if step not in (None, 1) or not ends or not isinstance(start, int):
        return None
    if start < 0 or isinstance(size, int) and start >= size:
        return None
    return start


def _beyond(inner: Expr, outer: Expr) -> list[Expr] | None:
    """The terms that `inner` adds to `outer`; None where it is not a sum with it."""
    if inner is outer:
        return []
    if inner.op == "add":
        for near, term in (inner.args, inner.args[::-1]):
            found = _beyond(near, outer)
            if found is not None:
                return [*found, term]
    return None


def _ends(reader: Reader, term: Expr, part: Part) -> bool:
    """Is a term 0 outside of the part by itself?"""
    return term.op == "load" and not term.args and part in reader.operands[term.value].parts


def parts_in(layout: Layout, parts: list[Part]) -> tuple[Part, ...]:
    """The parts that a layout has axes of."""
    have = axes_of(layout)
    found = tuple(p for p in parts if p.axes & have)
    if len({resolve(p.of) for p in found}) != len(found):
        raise Decline("an operand of two parts of one axis")
    return found


def _same_along(a: Any, b: Any, dim: Any) -> bool:
    """Is a slice along `dim` the whole of what it is cut from? x[:] = value is."""
    return same_length(shape_of(a.meta["val"])[dim], shape_of(b.meta["val"])[dim])
