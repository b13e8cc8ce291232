"""Whole numbers along an axis of a map: clamp(floor(x) + number), and the places x behind them.

`Places` reads an index backwards over rearrangements, casts that round nothing, clamps and tensors
that are put together, to the tensor that is rounded down. Bounds are numbers or symbolic sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from attnopt.passes.normalize import is_tensor, op_name
from attnopt.passes.recognize.axes import (
    Axis,
    Layout,
    length,
    product,
    same_length,
    settle,
    shape_of,
)
from attnopt.passes.recognize.layout import LAYOUT_OPS, Step
from attnopt.passes.recognize.pointwise import CASTS
from attnopt.passes.recognize.sampling_parts import cut, moved
from attnopt.passes.recognize.sampling_sums import Operand
from attnopt.rules import Decline

_CLAMPS = frozenset(("clamp", "clip", "clamp_min", "clamp_max"))
_JOINS = frozenset(("stack", "cat", "concat"))
#: comparisons, by the side of the number on which they hold
ORDER = {"ge": 1, "gt": 1, "le": -1, "lt": -1}


def _not_clamped(node: fx.Node) -> Decline:
    return Decline("a coordinate that is not clamped to the grid", node)


def converts(node: fx.Node) -> bool:
    """A conversion between any types."""
    return node.op == "call_function" and op_name(node) in CASTS and is_tensor(node.args[0])


def rounded(node: Any) -> Any:
    """The x that a node rounds down: floor(x), x // 1, x - x % 1; None for any other node."""
    if not is_tensor(node) or node.op != "call_function" or not is_tensor(node.args[0]):
        return None
    name, source = op_name(node), node.args[0]
    if name == "floor":
        return source
    if name == "floor_divide" or node.kwargs.get("rounding_mode") == "floor":
        return source if type(node.args[1]) in (int, float) and node.args[1] == 1 else None
    if name == "sub" and not node.kwargs and is_tensor(node.args[1]):
        return source if fraction(node.args[1]) is source else None
    return None


def fraction(node: Any) -> Any:
    """The x of x % 1, which is x - floor(x); None for any other node."""
    if not is_tensor(node) or node.op != "call_function" or op_name(node) != "remainder":
        return None
    source, number = node.args
    return source if type(number) in (int, float) and number == 1 else None


@dataclass
class Place:
    """clamp(floor(base) + before, low, high) + behind"""

    base: Operand
    before: int
    low: Any
    high: Any
    behind: int


class Places:
    """Reads whole numbers.

    constant: the number that a tensor holds
    walked:   the nodes that were read
    fixed:    axes of which one number is meant
    """

    def __init__(self, constant: Callable[[Any], Any]) -> None:
        self.constant = constant
        self.walked: list[fx.Node] = []
        self.fixed: dict[Axis, int] = {}
        self._coordinates: dict[int, Axis] = {}

    def place(self, node: Any, layout: Layout) -> Place:
        """A whole number along one axis, which must be floor(x) + number, clamped."""
        behind, before = 0, 0
        low, high = -math.inf, math.inf
        clamped = False
        while True:
            node, layout = self.plain(node, layout)
            name, source = op_name(node), node.args[0] if node.args else None
            if (base := rounded(node)) is not None:
                base = self.plain(base, layout)
                if not base[0].meta["val"].is_floating_point():
                    raise Decline("a place that is no floating number", node)
                return Place(base, before, low, high, behind)
            if (name in _CLAMPS or name == "where") and not (clamped and before):
                low, high, source = self._clamped(node, low, high)
                clamped = True
            elif name in ("add", "sub") and type(node.args[1]) in (int, float) \
                    and node.args[1] % 1 == 0 and node.kwargs.get("alpha", 1) == 1:
                number = int(node.args[1]) * (1 if name == "add" else -1)
                behind, before = (behind, before + number) if clamped else (
                    behind + number, before)
            else:
                raise Decline("a coordinate that is not a rounded place", node)
            node = source

    def within(self, node: Any, layout: Layout, size: int) -> Operand:
        """A whole number along one axis, which must be clamped to 0 … size - 1."""
        start, found = node, None
        low, high = -math.inf, math.inf
        while (low, high) != (0, size - 1):
            node, layout = self.plain(node, layout)
            found = found or (node, layout)
            if node.op != "call_function" or op_name(node) not in _CLAMPS:
                raise _not_clamped(start)
            low, high, node = self._clamped(node, low, high)
        assert found is not None
        return found

    def _clamped(self, node: fx.Node, low: Any, high: Any) -> tuple[Any, Any, Any]:
        """The bounds with those of a clamp, or of where(x < low, low, x), and the x."""
        if op_name(node) == "where":
            least, most, source = self._chosen(node)
        else:
            least, most, source = *self._ends(node), node.args[0]
        low = least if gap(least, low) > 0 else low
        high = most if gap(most, high) < 0 else high
        if type(low) in (int, float) and type(high) in (int, float) and low > high:
            raise _not_clamped(node)
        return low, high, source

    def _chosen(self, node: fx.Node) -> tuple[Any, Any, Any]:
        condition, bound, source = (*node.args, None, None)[:3]
        assert isinstance(condition, fx.Node)
        limit = self.number(bound)
        name = op_name(condition)
        if name not in ORDER or limit is None or condition.args[0] is not source or (
                self.number(condition.args[1]) != limit):
            raise _not_clamped(node)
        return (-math.inf, limit, source) if ORDER[name] > 0 else (limit, math.inf, source)

    def _ends(self, node: fx.Node) -> tuple[Any, Any]:
        """The bounds of a clamp."""
        ends: list[Any] = [-math.inf, math.inf]
        only = {"clamp_min": 0, "clamp_max": 1}.get(op_name(node))
        for i, name in enumerate(("min", "max")):
            at = 1 if only is not None else 1 + i
            given = node.args[at] if len(node.args) > at else node.kwargs.get(name)
            if given is not None and only in (None, i):
                ends[i] = self.number(given)
        if None in ends:
            raise _not_clamped(node)
        return ends[0], ends[1]

    def number(self, x: Any) -> Any:
        """A number, that of a constant tensor, or a symbolic size; None for anything else."""
        if is_tensor(x):
            return self.constant(x)
        if isinstance(x, fx.Node):
            size = x.meta.get("val")
            return length(size) if isinstance(size, torch.SymInt) else None
        return x if type(x) in (int, float) else None

    # -- rearrangements ---------------------------------------------------------------------
    def plain(self, node: Any, layout: Layout) -> Operand:
        """Back over rearrangements, casts of whole numbers, and the choice of a coordinate."""
        while is_tensor(node) and node.op == "call_function":
            step = moved(node, layout) or self.part(node, layout)
            if step is None and converts(node):
                source: Any = node.args[0]
                kinds = [n.meta["val"].dtype for n in (source, node)]
                if kinds[0] is not kinds[1] and not (
                        all(k.itemsize >= 4 and not k.is_complex for k in kinds)
                        and (not kinds[0].is_floating_point or self._whole(source)
                             and not kinds[1].is_floating_point)):
                    return node, settle(layout)
                step = (source, layout)
            elif step is None and (piece := cut(node)) is not None and not piece[3]:
                source, dim, number, _ = piece
                size = shape_of(source.meta["val"])[dim]
                if size != 2 or dim != len(layout) or self._coordinate(layout) is not None:
                    return node, settle(layout)
                axis = self._coordinates.setdefault(number, Axis(2))
                self.fixed[axis] = number
                step = (source, (*layout, (axis,)))
            if step is None:
                break
            self.walked.append(node)
            node, layout = step
        return node, settle(layout)

    def part(self, node: fx.Node, layout: Layout) -> Step | None:
        """The one that is meant of the tensors that are put together along a fixed axis."""
        if op_name(node) not in _JOINS:
            return None
        parts: Any = node.args[0]
        layout = settle(layout)
        dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        at = dim % len(layout)
        first, rest = layout[at][:1], layout[at][1:]
        if not first or first[0] not in self.fixed or not same_length(first[0].size, len(parts)):
            return None
        stacked = op_name(node) == "stack"
        if stacked and rest or not stacked and not all(
                same_length(shape_of(p.meta["val"])[at], product(rest)) for p in parts):
            return None
        own = (*layout[:at], *(() if stacked else (rest,)), *layout[at + 1:])
        return parts[self.fixed[first[0]]], own

    def _coordinate(self, layout: Layout) -> int | None:
        """The number of the coordinate that is picked of a tensor; None for none."""
        for number, axis in self._coordinates.items():
            if any(axis in dim for dim in layout):
                return number
        return None

    def locations(self, bases: tuple[Operand, ...], end: fx.Node
                  ) -> tuple[tuple[Operand, ...], Axis | None, tuple[int, ...]]:
        """The coordinates, the fastest first: tensors of their own or one."""
        numbers = tuple(self._coordinate(layout) for _, layout in reversed(bases))
        if set(numbers) == {None}:
            return tuple(reversed(bases)), None, ()
        (node, layout), *others = bases
        if len(bases) != 2 or set(numbers) != {0, 1} or any(
                n is not node or own[:-1] != layout[:-1] for n, own in others):
            raise Decline("coordinates that are cut from several tensors", end)
        axis = Axis(2)
        return (((node, (*layout[:-1], (axis,))),), axis,
                tuple(n for n in numbers if n is not None))

    # -- whole numbers in floating types ----------------------------------------------------
    def _whole(self, node: Any) -> bool:
        """Does a floating tensor hold whole numbers, so that a cast rounds nothing?"""
        return self._magnitude(node) is not None

    def _magnitude(self, node: Any) -> float | None:
        """The largest that a tensor of whole numbers can hold, inf where that is not known; None
        where it may hold others: sums and products must be exact."""
        if type(node) in (int, float):
            return None if node % 1 else abs(node)
        if not is_tensor(node):
            return None
        dtype = node.meta["val"].dtype
        if not dtype.is_floating_point:
            return math.inf
        name = op_name(node) if node.op == "call_function" else ""
        if rounded(node) is not None:
            return math.inf
        if name in LAYOUT_OPS or converts(node) or name == "select":
            found = self._magnitude(node.args[0])
        elif name in _JOINS:
            each = [self._magnitude(part) for part in node.args[0]]
            found = None if None in each else max(each)  # type: ignore[type-var]
        elif name in _CLAMPS:
            ends = [abs(n) if type(n) in (int, float) else math.inf for n in self._ends(node)]
            found = None if self._magnitude(node.args[0]) is None or any(
                n % 1 for n in ends if n < math.inf) else max(ends)
        elif name in ("add", "sub", "mul") and node.kwargs.get("alpha", 1) == 1:
            a, b = (self._magnitude(x) for x in node.args[:2])
            if a is None or b is None:
                return None
            found = a * b if name == "mul" else a + b
            if found == math.inf and (name == "mul" or all(map(is_tensor, node.args[:2]))):
                return None
        else:
            return None
        # A finite one beyond what the type holds exactly was rounded.
        return found if found in (None, math.inf) or found < 2 / torch.finfo(dtype).eps else None


def same(a: Operand, b: Operand) -> bool:
    return a[0] is b[0] and settle(a[1]) == settle(b[1])


def gap(a: Any, b: Any) -> float:
    """a - b of numbers and symbolic sizes; raises Decline where that depends on the sizes."""
    if a == b:
        return 0.0
    for one, sign in ((a, 1.0), (b, -1.0)):
        if type(one) is float and math.isinf(one):
            return sign * one
    found = sympy.expand(a - b)
    if not found.is_number:
        raise Decline("a bound that is compared with the size of a grid that is not known")
    return float(found)
