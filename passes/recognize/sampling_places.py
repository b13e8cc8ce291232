"""Texels that are read by index, and where: clamp(floor(x) + number) along each axis of a map.

`Places.texel` reads torch.gather and advanced indices, of flat numbers y * width + x or one index
for each axis, backwards to the tensor that is read and to the places x that are rounded down;
`unpadded` to the map without zeros around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from attnopt.passes.normalize import is_tensor, op_name
from attnopt.passes.recognize.axes import (
    Axis,
    Layout,
    broadcast,
    resolve,
    same_length,
    settle,
    shape_of,
)
from attnopt.passes.recognize.layout import LAYOUT_OPS, back
from attnopt.passes.recognize.sampling_gathers import clamp_bounds, counted
from attnopt.passes.recognize.sampling_parts import cut
from attnopt.passes.recognize.sampling_sums import Operand
from attnopt.rules import Decline

_CLAMPS = frozenset(("clamp", "clip", "clamp_min", "clamp_max"))
#: comparisons, by the side of the number on which they hold
ORDER = {"ge": 1, "gt": 1, "le": -1, "lt": -1}
_CASTS = frozenset(("to", "_to_copy", "type_as", "float", "double", "half", "bfloat16", "long",
                    "int"))


def converts(node: fx.Node) -> bool:
    """A conversion between any types."""
    return node.op == "call_function" and op_name(node) in _CASTS and is_tensor(node.args[0])


@dataclass
class Place:
    """clamp(floor(base) + before, low, high) + behind"""

    base: Operand
    before: int
    low: float
    high: float
    behind: int


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
    bounds: list[tuple[Operand, int, float]] = field(default_factory=list)
    #: whether a mask of both axes makes it 0, whatever its shares
    hidden: bool = False


class Places:
    """Reads texels; `walked` are the nodes that it came over, `constant` gives their numbers."""

    def __init__(self, constant: Callable[[Any], Any]) -> None:
        self.constant = constant
        self.walked: list[fx.Node] = []
        self.picked: dict[tuple[Any, int], Axis] = {}

    def texel(self, node: fx.Node, layout: Layout) -> Corner:
        value: Any = node.args[0]
        shape = shape_of(value.meta["val"])
        if op_name(node) == "gather":
            dim, index = node.args[1] % len(shape), node.args[2]  # type: ignore[operator]
            sizes = shape_of(index.meta["val"])  # type: ignore[union-attr]
            if any(not same_length(a, b) for i, (a, b) in enumerate(zip(shape, sizes, strict=True))
                   if i != dim):
                raise Decline("a gather of a part", node)
            own, numbers = list(layout), [(index, layout)]
            dims: tuple[int, ...] = (dim,)
        else:
            own, numbers, dims = _indexed(node, layout, shape)
        space = tuple(Axis(shape[d]) for d in dims)
        for d, axis in zip(dims, space, strict=True):
            own[d] = (axis,)
        if len(dims) == 2:
            return Corner((value, tuple(own)), space,
                           tuple(self.place(*number) for number in numbers))
        slow, fast, width = self._flat(*numbers[0])
        whole = space[0].size
        if not isinstance(whole, int) or width < 1 or whole % width:
            raise Decline("a flat number that is not y * width + x", node)
        space[0].become(made := (Axis(whole // width), Axis(width)))
        return Corner((value, tuple(own)), made, (self.place(*slow), self.place(*fast)))

    def _flat(self, node: Any, layout: Layout) -> tuple[Operand, Operand, int]:
        """(y, x, width) of the number y * width + x."""
        node, layout = self.plain(node, layout)
        if op_name(node) == "add" and node.kwargs.get("alpha", 1) == 1:
            for rows, fast in (node.args[:2], node.args[1::-1]):
                if not (is_tensor(rows) and is_tensor(fast)):
                    continue
                deep, own = self.plain(rows, broadcast(layout, shape_of(rows.meta["val"])))
                if op_name(deep) == "mul" and type(deep.args[1]) is int and is_tensor(deep.args[0]):
                    slow: Any = deep.args[0]
                    return ((slow, broadcast(own, shape_of(slow.meta["val"]))),
                            (fast, broadcast(layout, shape_of(fast.meta["val"]))), deep.args[1])
        raise Decline("a flat number that is not y * width + x", node)

    def place(self, node: Any, layout: Layout) -> Place:
        """A whole number along one axis, which must be floor(x) + number, clamped."""
        behind, before, low, high = 0, 0, -math.inf, math.inf
        clamped = False
        while True:
            node, layout = self.plain(node, layout)
            name, source = op_name(node), node.args[0] if node.args else None
            if (name in _CLAMPS or name == "where") and not (clamped and before):
                least, most, source = self._chosen_or_clamped(node)
                low, high, clamped = max(low, least), min(high, most), True
                if low > high:
                    raise Decline("a coordinate that is not clamped to the grid", node)
            elif name in ("add", "sub") and type(node.args[1]) in (int, float) \
                    and node.args[1] % 1 == 0 and node.kwargs.get("alpha", 1) == 1:
                number = int(node.args[1]) * (1 if name == "add" else -1)
                behind, before = (behind, before + number) if clamped else (
                    behind + number, before)
            elif name == "floor":
                base = self.plain(node.args[0], layout)
                if not base[0].meta["val"].is_floating_point():
                    raise Decline("a place that is no floating number", node)
                return Place((base[0], settle(base[1])), before, low, high, behind)
            else:
                raise Decline("a coordinate that is not a rounded place", node)
            node = source

    def _chosen_or_clamped(self, node: fx.Node) -> tuple[float, float, Any]:
        """The bounds of a clamp, or of where(x < low, low, x), and the x."""
        if op_name(node) != "where":
            return (*_clamp(node), node.args[0])
        condition, bound, source = (*node.args, None, None)[:3]
        assert isinstance(condition, fx.Node)
        limit = self.number(bound)
        name = op_name(condition)
        if name not in ORDER or limit is None or condition.args[0] is not source or (
                self.number(condition.args[1]) != limit):
            raise Decline("a coordinate that is not clamped to the grid", node)
        return (-math.inf, limit, source) if ORDER[name] > 0 else (limit, math.inf, source)

    def number(self, x: Any) -> Any:
        """A number, or that of a constant tensor; None for anything else."""
        return self.constant(x) if is_tensor(x) else x if type(x) in (int, float) else None

    def plain(self, node: Any, layout: Layout) -> Operand:
        """Back over rearrangements, casts of whole numbers, and the choice of a coordinate."""
        while is_tensor(node) and node.op == "call_function":
            step = back(node, layout)
            if step is None and converts(node):
                source: Any = node.args[0]
                kinds = [n.meta["val"].dtype for n in (source, node)]
                if kinds[0] is not kinds[1] and not (
                        all(k.itemsize >= 4 and not k.is_complex for k in kinds)
                        and (not kinds[0].is_floating_point or _whole(source)
                             and not kinds[1].is_floating_point)):
                    return node, settle(layout)
                step = (source, layout)
            elif step is None and (part := cut(node)) is not None and not part[3]:
                source, dim, number, _ = part
                size = shape_of(source.meta["val"])[dim]
                if size != 2 or dim != len(layout) or self._chosen(layout):
                    return node, settle(layout)
                axis = self.picked.setdefault((size, number), Axis(size))
                step = (source, (*layout, (axis,)))
            if step is None:
                break
            self.walked.append(node)
            node, layout = step
        return node, settle(layout)

    def _chosen(self, layout: Layout) -> int | None:
        """Which is 1 + the number of the coordinate that is picked of a tensor; None for none."""
        for (_, number), axis in self.picked.items():
            if any(axis in dim for dim in layout):
                return number + 1
        return None

    def locations(self, bases: tuple[Operand, ...], end: fx.Node
                  ) -> tuple[tuple[Operand, ...], Axis | None, tuple[int, ...]]:
        """The coordinates, the fastest first: tensors of their own or one."""
        numbers = tuple(self._chosen(layout) for _, layout in reversed(bases))
        if numbers == (None, None):
            return tuple(reversed(bases)), None, ()
        (node, layout), (other, own) = bases
        if node is not other or layout[:-1] != own[:-1] or set(numbers) != {1, 2}:
            raise Decline("coordinates that are cut from several tensors", end)
        axis = Axis(2)
        return (((node, (*layout[:-1], (axis,))),), axis,
                tuple(n - 1 for n in numbers if n is not None))


def same(a: Operand, b: Operand) -> bool:
    return a[0] is b[0] and settle(a[1]) == settle(b[1])


def _clamp(node: fx.Node) -> tuple[float, float]:
    """The bounds of a clamp."""
    least, most = clamp_bounds(node)
    if op_name(node) == "clamp_max":
        least, most = None, node.args[1]
    least, most = -math.inf if least is None else least, math.inf if most is None else most
    if not all(isinstance(n, (int, float)) for n in (least, most)):
        raise Decline("a coordinate that is not clamped to the grid", node)
    return least, most


def _whole(node: Any) -> bool:
    """Does a floating tensor hold whole numbers, so that a cast rounds nothing?"""
    return _magnitude(node) is not None


def _magnitude(node: Any) -> float | None:
    """The largest that a tensor of whole numbers can hold, inf where that is not known; None where
    it may hold others: sums and products must be exact."""
    if type(node) in (int, float):
        return None if node % 1 else abs(node)
    if not is_tensor(node):
        return None
    dtype = node.meta["val"].dtype
    if not dtype.is_floating_point:
        return math.inf
    name = op_name(node) if node.op == "call_function" else ""
    if name == "floor":
        return math.inf
    if name in LAYOUT_OPS or converts(node) or name == "select":
        found = _magnitude(node.args[0])
    elif name in _CLAMPS:
        low, high = map(abs, _clamp(node))
        found = None if _magnitude(node.args[0]) is None or any(
            n % 1 for n in (low, high) if n < math.inf) else max(low, high)
    elif name in ("add", "sub", "mul") and node.kwargs.get("alpha", 1) == 1:
        a, b = (_magnitude(x) for x in node.args[:2])
        if a is None or b is None:
            return None
        found = a * b if name == "mul" else a + b
        if found == math.inf and (name == "mul" or all(map(is_tensor, node.args[:2]))):
            return None
    else:
        return None
    # A finite one beyond what the type holds exactly was rounded.
    return found if found in (None, math.inf) or found < 2 / torch.finfo(dtype).eps else None


def _indexed(node: fx.Node, layout: Layout, shape: Sequence[Any]
             ) -> tuple[list[tuple[Axis, ...]], list[Operand], tuple[int, ...]]:
    """Of value[batch, ..., y, x] or value[batch, ..., number]: the axes of value's dimensions,
    the indices, and the dimensions that they run along."""
    indices: Any = node.args[1]
    at = tuple(i for i, x in enumerate(indices) if x is not None)
    if len(at) not in (2, 3) or any(indices[i].meta["val"].is_floating_point() or
                                    indices[i].meta["val"].dtype.itemsize < 4 for i in at):
        raise Decline("a look-up that is not of the batch and a place", node)
    dims = max(indices[i].meta["val"].dim() for i in at)
    start = at[0] if at == tuple(range(at[0], at[-1] + 1)) else 0
    where = layout[start:start + dims]
    rest = iter((*layout[:start], *layout[start + dims:]))
    own = [() if i in at else next(rest) for i in range(len(shape))]
    numbers = [(indices[i], settle(broadcast(where, shape_of(indices[i].meta["val"]))))
               for i in at]
    own[at[0]] = counted(*numbers[0], shape[at[0]])
    return own, numbers[1:], at[1:]


def unpadded(corner: Corner) -> tuple[Operand, tuple[Axis, ...], list[tuple[int, int]]]:
    """The map without zeros around it, its axes, and how many zeros there are at their ends."""
    (node, layout), space = corner.map, corner.space
    layout = settle(layout)
    while node.op == "call_function" and (step := back(node, layout)) is not None:
        node, layout = step
    if op_name(node) not in ("pad", "constant_pad_nd"):
        if not all(isinstance(a.size, int) for a in space):
            raise Decline("the size of a grid is not known", node)
        return (node, settle(layout)), space, [(0, 0)] * len(space)
    source, widths, *more = node.args
    mode = more[0] if more and isinstance(more[0], str) else node.kwargs.get("mode", "constant")
    fill = more[-1] if more and not isinstance(more[-1], str) else node.kwargs.get("value")
    layout, found = settle(layout), list(settle(layout))
    if mode != "constant" or fill not in (None, 0) or not is_tensor(source):
        raise Decline("a map that is not padded by zeros", node)
    pads = {len(found) - 1 - i // 2: tuple(widths[i:i + 2])  # type: ignore[index,arg-type]
            for i in range(0, len(widths), 2)}  # type: ignore[arg-type]
    sizes = shape_of(source.meta["val"])  # type: ignore[union-attr]
    axes, around = [], []
    for axis in space:
        own, *others = [i for i, dim in enumerate(layout) if dim == resolve((axis,))] or [-1]
        ends = pads.pop(own, (0, 0))
        if own < 0 or others or min(ends) < 0 or not isinstance(sizes[own], int):
            raise Decline("a map that is not padded by zeros", node)
        axes.append(Axis(sizes[own]))
        found[own] = (axes[-1],)
        around.append((int(ends[0]), int(ends[1])))
    if any(set(ends) != {0} for ends in pads.values()):
        raise Decline("a padded batch", node)
    return (source, tuple(found)), tuple(axes), around  # type: ignore[return-value]
