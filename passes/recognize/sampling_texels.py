"""Texels that are read by index: which tensor they are of, and at which place of its map.

`texel` reads torch.gather, torch.take_along_dim, torch.index_select, F.embedding and advanced
indices: one index for each axis of the map, or flat numbers

    ((batch * height + y) * width + x) * heads + head

of any of these, in any order, whose slowest part is not scaled at all. The batch and what else
belongs to the value is counted (0, 1, 2 …). `unpadded` finds the map without zeros around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import fx

from attnopt.passes.normalize import is_tensor, op_name
from attnopt.passes.recognize.axes import (
    Axis,
    Layout,
    broadcast,
    product,
    quotient,
    resolve,
    same_length,
    settle,
    shape_of,
)
from attnopt.passes.recognize.sampling_parts import moved
from attnopt.passes.recognize.sampling_places import Place, Places
from attnopt.passes.recognize.sampling_sums import Operand
from attnopt.rules import Decline

READS = frozenset(("gather", "take_along_dim", "index_select", "embedding", "index"))


@dataclass(frozen=True)
class Affine:
    """place * x + floor * floor(x) + number of the x of one base."""

    base: Operand | None
    place: float
    floor: float
    number: float


@dataclass
class Corner:
    """A texel, and what it is multiplied by.

    map: the tensor that is read, with one axis for each of the grid's (slowest first)
    """

    map: Operand
    space: tuple[Axis, ...]
    places: tuple[Place, ...]
    shares: list[Affine] = field(default_factory=list)
    #: (base, 1 where floor(base) is at least the number and -1 where at most, number)
    bounds: list[tuple[Operand, int, Any]] = field(default_factory=list)
    #: whether a mask of both axes makes it 0, whatever its shares
    hidden: bool = False


class _Term(NamedTuple):
    """factor * node; scaled: how often it is multiplied, whatever by"""

    factor: Any
    scaled: int
    counts: bool
    node: fx.Node
    layout: Layout


def texel(places: Places, node: fx.Node, layout: Layout) -> Corner:
    """What a look-up reads, of a map of two axes."""
    value, own, numbers = _look_up(node, layout)
    space: list[Axis] = []
    found: list[Place] = []
    for dim, number in numbers.items():
        axes: list[Axis] = []
        for term, size in _digits(places, number, shape_of(value.meta["val"])[dim]):
            if term.counts:
                axes += counted(term.node, term.layout, size)
                continue
            space.append(Axis(size))
            axes.append(space[-1])
            found.append(places.place(term.node, term.layout))
        own[dim] = tuple(axes)
    if len(space) != 2:
        raise _not_flat(node)
    return Corner((value, tuple(own)), tuple(space), tuple(found))


def _look_up(node: fx.Node, layout: Layout
             ) -> tuple[fx.Node, list[tuple[Axis, ...]], dict[int, Operand]]:
    """The tensor that is read, the axes of its dimensions, and by dimension its indices."""
    name = op_name(node)
    value, *rest = node.args
    if name == "embedding":
        if rest[1:] and rest[1:] != [-1, False, False][:len(rest) - 1]:
            raise Decline("an embedding whose gradient is another one", node)
        return value, [(), layout[-1]], {0: (rest[0], layout[:-1])}  # type: ignore[return-value]
    shape = shape_of(value.meta["val"])  # type: ignore[union-attr]
    if name == "index":
        return _indexed(node, layout, shape)
    index, dim = rest if name == "take_along_dim" else rest[1::-1]
    dim = dim % len(shape)  # type: ignore[operator,assignment]
    sizes = shape_of(index.meta["val"])  # type: ignore[union-attr]
    if name == "index_select":
        return value, list(layout), {dim: (index, (layout[dim],))}  # type: ignore
    if name == "gather" and any(not same_length(a, b) for i, (a, b) in enumerate(
            zip(shape, sizes, strict=True)) if i != dim):
        raise Decline("a gather of a part", node)
    return value, list(broadcast(layout, shape)), {  # type: ignore[return-value]
        dim: (index, broadcast(layout, sizes))}


def _indexed(node: fx.Node, layout: Layout, shape: Sequence[Any]
             ) -> tuple[fx.Node, list[tuple[Axis, ...]], dict[int, Operand]]:
    """Of value[..., i, ..., j]: the indices are broadcast, and where they are not side by side
    their dimensions come first."""
    value: Any = node.args[0]
    indices: Any = node.args[1]
    at = [i for i, x in enumerate(indices) if x is not None]
    if any(indices[i].meta["val"].is_floating_point() or
           indices[i].meta["val"].dtype.itemsize < 4 for i in at):
        raise Decline("a look-up that is not of the batch and a place", node)
    dims = max(indices[i].meta["val"].dim() for i in at)
    start = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
    where = layout[start:start + dims]
    rest = iter((*layout[:start], *layout[start + dims:]))
    own = [() if i in at else next(rest) for i in range(len(shape))]
    return value, own, {
        i: (indices[i], settle(broadcast(where, shape_of(indices[i].meta["val"])))) for i in at}


# -- flat numbers ----------------------------------------------------------------------------------
def _digits(places: Places, number: Operand, size: Any) -> list[tuple[_Term, Any]]:
    """The terms of a flat number below `size`, the slowest first, with how many numbers each has
    for its terms to be those of y * width + x."""
    terms, found = _terms(places, *number), []
    # Where the factors are the same, of axes of length 1, what is scaled more often is slower.
    terms.sort(key=lambda t: (not t.counts, -t.scaled))
    while terms:
        top = next((t for t in terms if all(
            quotient(t.factor, u.factor) is not None for u in terms)), None)
        own = None if top is None else quotient(size, top.factor)
        if top is None or own is None:
            raise _not_flat(number[0])
        terms.remove(top)
        found.append((top, own))
        size = top.factor
    if size != 1:
        raise _not_flat(number[0])
    return found


def _terms(places: Places, node: Any, layout: Layout, factor: Any = 1, scaled: int = 0
           ) -> list[_Term]:
    """The tensors that a whole number is the sum of multiples of."""
    node, layout = places.plain(node, layout)
    name = op_name(node) if node.op == "call_function" else ""
    sides = [x for x in node.args[:2] if is_tensor(x)] if name in ("add", "mul") else []
    own = [(x, broadcast(layout, shape_of(x.meta["val"]))) for x in sides]
    if name == "add" and len(sides) == 2 and node.kwargs.get("alpha", 1) == 1:
        return [t for x in own for t in _terms(places, *x, factor, scaled)]
    if name == "mul" and len(sides) == 1:
        number = places.number(node.args[1] if sides[0] is node.args[0] else node.args[0])
        if number is None or isinstance(number, float) or isinstance(number, int) and number < 1:
            raise _not_flat(node)
        return _terms(places, *own[0], factor * number, scaled + 1)
    if name == "arange" and shape_of(node.meta["val"]) == (1,):
        counted(node, layout, 1)
        return []  # it counts 0
    return [_Term(factor, scaled, name == "arange", node, layout)]


def _not_flat(node: fx.Node) -> Decline:
    return Decline("a flat number that is not y * width + x", node)


def counted(node: fx.Node, layout: Layout, size: Any) -> tuple[Axis, ...]:
    """The axes that an index of the batch counts: 0, 1, 2 … along them."""
    while (step := moved(node, layout)) is not None:
        node, layout = step
    name = op_name(node) if node.op == "call_function" else ""
    first = node.args[0] if len(node.args) > 1 else 0
    if name != "arange" or first != 0 or len(node.args) > 2 and node.args[2] != 1:
        raise Decline("the batch of a look-up is not counted", node)
    axes = resolve(settle(layout)[0])
    if not same_length(product(axes), size):
        raise Decline("a look-up reads a part of the batch", node)
    return axes


# -- zeros around a map ----------------------------------------------------------------------------
def unpadded(corner: Corner) -> tuple[Operand, tuple[Axis, ...], list[tuple[int, int]]]:
    """The map without zeros around it, its axes, and how many zeros there are at their ends."""
    (node, layout), space = corner.map, corner.space
    layout = settle(layout)
    while (step := moved(node, layout)) is not None:
        node, layout = step
    if op_name(node) not in ("pad", "constant_pad_nd"):
        return (node, settle(layout)), space, [(0, 0)] * len(space)
    source, widths, *more = node.args
    mode = more[0] if more and isinstance(more[0], str) else node.kwargs.get("mode", "constant")
    fill = more[-1] if more and not isinstance(more[-1], str) else node.kwargs.get("value")
    layout, found = settle(layout), list(settle(layout))
    if mode != "constant" or fill not in (None, 0) or not is_tensor(source) or not all(
            isinstance(n, int) for n in widths):  # type: ignore[union-attr]
        raise Decline("a map that is not padded by zeros", node)
    pads = {len(found) - 1 - i // 2: tuple(widths[i:i + 2])  # type: ignore[index,arg-type]
            for i in range(0, len(widths), 2)}  # type: ignore[arg-type]
    sizes = shape_of(source.meta["val"])  # type: ignore[union-attr]
    axes, around = [], []
    for axis in space:
        own, *others = [i for i, dim in enumerate(layout) if dim == resolve((axis,))] or [-1]
        ends = pads.pop(own, (0, 0))
        if own < 0 or others or min(ends) < 0:
            raise Decline("a map that is not padded by zeros", node)
        axes.append(Axis(sizes[own]))
        found[own] = (axes[-1],)
        around.append((int(ends[0]), int(ends[1])))
    if any(set(ends) != {0} for ends in pads.values()):
        raise Decline("a padded batch", node)
    return (source, tuple(found)), tuple(axes), around  # type: ignore[return-value]
