"""Weighted sums of samples, read backwards to the operations that sample.

    out = sum over points of  weight * F.grid_sample(value, grid)

The sum over points and levels may be one product (einsum, matmul, multiply and sum) of stacked or
concatenated samples, a sum for each level that is added to the others, or a stack of such sums that
is summed; or a mean, and without weights. Each operation that samples becomes a `Term`: its
`Sample`, the tensor of weights it meets, and which part of an axis of all levels it is (its pick).
Axes are those of `axes.py`; names and orders of dimensions say nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from attnopt.passes.normalize import is_tensor, op_name
from attnopt.passes.recognize.axes import (
    Axis,
    Layout,
    axes_of,
    broadcast,
    meet,
    product,
    resolve,
    same_length,
    settle,
    shape_of,
)
from attnopt.passes.recognize.contraction import Contraction, contraction, reduced_dims
from attnopt.passes.recognize.layout import LAYOUT_OPS, back
from attnopt.passes.recognize.pointwise import is_cast
from attnopt.passes.recognize.program import Program
from attnopt.rules import Decline

Operand = tuple[fx.Node, Layout]


@dataclass(frozen=True)
class Pick:
    """A part of an axis: the elements `start` to `start + product(axes)`, which are `axes`."""

    start: int
    axes: tuple[Axis, ...]


@dataclass
class Sample:
    """One operation that samples a grid.

    value:      the grid, with the layout of its tensor
    space:      the axes of the grid in that layout, the slowest first
    locations:  where it is sampled; (..., R), or a tensor for each axis of the grid, fastest first
    coordinate: the axis of R, None where the coordinates are tensors of their own
    mode, padding, align_corners, range: as `Sampling` has them
    depth, depth_axis: where the grid has one more axis, of depths, along which `value` does not
                vary, and how much of the value there is at each
    """

    node: fx.Node
    value: Operand
    space: tuple[Axis, ...]
    locations: tuple[Operand, ...]
    coordinate: Axis | None
    mode: str
    padding: str
    align_corners: bool
    range: str
    depth: Operand | None = None
    depth_axis: Axis | None = None
    #: coordinates of the grid's axes, the fastest first, then the depth's, among those of locations
    order: tuple[int, ...] = ()
    #: whether a place that is not finite gives 0 by a mask
    hidden: bool = False
    #: where it is several operations: those that the texels go through
    inner: tuple[fx.Node, ...] = ()


@dataclass
class Term:
    """A sample, its weights (None for 1), the summed axes, and what it is of the axis of
    levels."""

    sample: Sample
    weights: Operand | None
    summed: frozenset[Axis]
    picks: Mapping[Axis, Pick]


@dataclass(frozen=True)
class _Context:
    """What lies between the end and the node that is being read."""

    weights: Operand | None = None
    summed: tuple[Axis, ...] = ()
    picks: Mapping[Axis, Pick] = field(default_factory=dict)


#: by operation, how a sample is read: (node, layout of its result) -> Sample
Reader = Callable[[Program, fx.Node, Layout], Sample]
#: operations that sum over an axis
SUMS = frozenset(("sum", "mean", "matmul", "bmm", "einsum"))
_CARRIERS = LAYOUT_OPS | SUMS | frozenset(("stack", "cat", "concat", "mul", "add"))


def _no_sample(node: Any) -> Decline:
    return Decline("what is added to the samples is none", node)


def carries(node: fx.Node) -> bool:
    """May a sample be part of a weighted sum through this operation?"""
    return node.op == "call_function" and (op_name(node) in _CARRIERS or is_cast(node))


class Sums:
    """Reads weighted sums of a program backwards; `reader` says how an operation samples, if so."""

    def __init__(self, program: Program, reader: Callable[[fx.Node], Reader | None]) -> None:
        self.program, self.reader = program, reader
        self.terms: list[Term] = []
        self.interior: list[fx.Node] = []
        self.scale = 1.0  # what the sum is multiplied by, where it is a mean
        self._leads: dict[fx.Node, bool] = {}

    def read(self, end: fx.Node, layout: Layout) -> list[Term]:
        """The terms that `end` is the sum of; raises Decline where it is no such sum."""
        self.terms, self.interior, self.scale = [], [], 1.0
        if op_name(end) == "mean":
            self.scale = self._averaged(end, layout)
        else:
            self._read(end, layout, _Context())
        if not self.terms:
            raise Decline("nothing is sampled", end)
        return self.terms

    def leads(self, node: Any) -> bool:
        """Is `node` made of samples by operations that a weighted sum may have?"""
        if not is_tensor(node):
            return False
        if node not in self._leads:
            self._leads[node] = False
            self._leads[node] = node.op == "call_function" and (
                self.reader(node) is not None
                or carries(node) and any(map(self.leads, node.all_input_nodes)))
        return self._leads[node]

    # -- reading ----------------------------------------------------------------------------
    def _read(self, node: Any, layout: Layout, within: _Context) -> None:
        if not is_tensor(node) or not self.leads(node):
            raise _no_sample(node)
        if node.meta.get("attnopt_opaque"):
            raise Decline("the samples are written in place through shared memory", node)
        layout = settle(layout)
        self.interior.append(node)
        reader = self.reader(node)
        if reader is None:
            self._carried(node, layout, within)
            return
        try:
            self._sample(reader, node, layout, within)
        except Decline as no:
            if not carries(node):
                raise
            try:
                self._carried(node, layout, within)
            except Decline as other:
                raise (no if other.reason == _no_sample(node).reason else other) from None

    def _carried(self, node: fx.Node, layout: Layout, within: _Context) -> None:
        name, step = op_name(node), back(node, layout)
        if step is not None:
            self._read(*step, within)
        elif is_cast(node):
            self._read(node.args[0], layout, within)
        elif name == "stack":
            self._stacked(node, layout, within)
        elif name in ("cat", "concat"):
            self._joined(node, layout, within)
        elif name == "sum":
            self._summed(node, layout, within)
        elif name == "add":
            self._added(node, layout, within)
        elif name == "mul":
            left, right = node.args
            if not (is_tensor(left) and is_tensor(right)):
                raise Decline("the samples are scaled by a number", node)
            self._weighted(node, [(x, broadcast(layout, shape_of(x.meta["val"])))
                                  for x in (left, right)], within)
        else:
            found = contraction(node)
            if found is None or found.addend is not None or found.alpha != 1:
                raise Decline(f"{name} between the samples and their sum", node)
            self._product(found, layout, within)

    def _sample(self, reader: Reader, node: fx.Node, layout: Layout, within: _Context) -> None:
        if within.weights is None and not within.summed:
            raise Decline("samples that are neither weighted nor summed", node)
        sample = reader(self.program, node, layout)
        self.interior.extend(sample.inner)
        self.terms.append(
            Term(sample, within.weights, frozenset(resolve(within.summed)), within.picks))

    def _weighted(self, node: fx.Node, sides: Sequence[Operand], within: _Context) -> None:
        if within.weights is not None:
            raise Decline("samples are weighted twice", node)
        reasons = []
        kept, inside = len(self.terms), len(self.interior)
        for samples, weights in (sides, sides[::-1]):
            if not self.leads(samples[0]):
                continue
            try:
                self._read(*samples, replace(within, weights=weights))
                return
            except Decline as no:
                reasons.append(no)
                del self.terms[kept:], self.interior[inside:]
        raise reasons[0] if reasons else _no_sample(node)

    def _product(self, found: Contraction, layout: Layout, within: _Context) -> None:
        meet(found.out_layout, layout)
        self.interior.extend(found.inner)
        summed = (*within.summed, *found.contracted)
        self._weighted(found.node, [(n, settle(x)) for n, x in found.sides()],
                       replace(within, summed=summed))

    def _averaged(self, end: fx.Node, layout: Layout) -> float:
        """Read a mean over points as a sum; what the sum is to be multiplied by."""
        dims, _ = reduced_dims(end)
        sizes = shape_of(end.args[0].meta["val"])  # type: ignore[union-attr]
        count = math.prod(sizes[d] for d in dims)
        if not isinstance(count, int) or count < 1:
            raise Decline("a number of points that is not known", end)
        if end.meta["val"].dtype != end.args[0].meta["val"].dtype:  # type: ignore[union-attr]
            raise Decline("a mean in another dtype", end)
        self.interior.append(end)
        self._summed(end, settle(layout), _Context())
        return 1.0 / count

    def _summed(self, node: fx.Node, layout: Layout, within: _Context) -> None:
        dims, keep = reduced_dims(node)
        source = node.args[0]
        if not node.meta["val"].is_floating_point():
            raise Decline("a sum in whole numbers", node)
        rows = iter(layout)
        inner: list[tuple[Axis, ...]] = []
        fresh: list[Axis] = []
        for i, size in enumerate(shape_of(source.meta["val"])):  # type: ignore[union-attr]
            if i in dims:
                if keep:
                    next(rows)
                fresh.append(Axis(size))
                inner.append((fresh[-1],))
            else:
                inner.append(next(rows))
        self._read(source, tuple(inner), replace(within, summed=(*within.summed, *fresh)))

    def _added(self, node: fx.Node, layout: Layout, within: _Context) -> None:
        if node.kwargs.get("alpha", 1) != 1:
            raise Decline("samples are added with a factor", node)
        for part in node.args[:2]:
            if part == 0 or isinstance(part, fx.Node) and self.program.constant(part) == 0:
                continue
            if not is_tensor(part):
                raise Decline("a number is added to the samples", node)
            shape = shape_of(part.meta["val"])  # type: ignore[union-attr]
            own = broadcast(layout, shape)
            if len(shape) != len(layout) or settle(own) != layout:
                raise Decline("samples are broadcast in a sum", node)
            self._read(part, own, within)

    def _stacked(self, node: fx.Node, layout: Layout, within: _Context) -> None:
        parts = node.args[0]
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        at = dim % len(layout)  # type: ignore[operator]
        axes = self._levels(node, layout[at], within)
        rest = (*layout[:at], *layout[at + 1:])
        for i, part in enumerate(parts):  # type: ignore[arg-type,var-annotated]
            self._read(part, rest, _picked(within, axes, Pick(i, ())))

    def _joined(self, node: fx.Node, layout: Layout, within: _Context) -> None:
        parts: Any = node.args[0]
        if len(parts) == 1:
            self._read(parts[0], layout, within)
            return
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        at = dim % len(layout)  # type: ignore[operator]
        lengths = [shape_of(p.meta["val"])[at] for p in parts]
        level, *points = layout[at] or ((),)
        if len(layout[at]) > 1 and same_length(level.size, len(parts)) and all(
                same_length(n, product(points)) for n in lengths):
            axes, start = self._levels(node, (level,), within), 0
            for i, part in enumerate(parts):
                inner = (*layout[:at], tuple(points), *layout[at + 1:])
                self._read(part, inner, _picked(within, axes, Pick(i, ())))
            return
        axes, start = self._levels(node, layout[at], within), 0
        for part, n in zip(parts, lengths, strict=True):
            if not isinstance(n, int):
                raise Decline("a number of points that is not known", node)
            own = (Axis(n),)
            inside = replace(within, summed=(*within.summed, *own))
            self._read(part, (*layout[:at], own, *layout[at + 1:]),
                       _picked(inside, axes, Pick(start, own)))
            start += n

    def _levels(self, node: fx.Node, axes: tuple[Axis, ...], within: _Context) -> tuple[Axis, ...]:
        """The axis of the levels, () where there is one of length 1."""
        if len(axes) > 1:
            raise Decline("levels are mixed with another axis", node)
        if not set(axes) <= set(resolve(within.summed)):
            raise Decline("samples are put together along an axis that is not summed", node)
        return axes


def _picked(within: _Context, axes: tuple[Axis, ...], pick: Pick) -> _Context:
    if not axes:
        return within
    if within.picks:
        raise Decline("levels of levels")
    return replace(within, picks={axes[0]: pick})


# -- operations that sample ------------------------------------------------------------------------
_MODES = ("linear", "nearest", "bicubic")
_PADDINGS = ("zeros", "border", "reflection")


def grid_sampler(program: Program, node: fx.Node, layout: Layout) -> Sample:
    """F.grid_sample of (N, C, [D,] H, W) at (N, ..., 2 or 3), whose last are (x, y[, z])."""
    value, grid, mode, padding, align = node.args
    assert is_tensor(value) and is_tensor(grid)
    batch, channels, *where = layout
    shape = shape_of(value.meta["val"])  # type: ignore[union-attr]
    space = tuple(Axis(n) for n in shape[2:])
    coordinate = Axis(len(space))
    return Sample(
        node, (value, (batch, channels, *((a,) for a in space))), space,  # type: ignore[arg-type]
        ((grid, (batch, *where, (coordinate,))),), coordinate,  # type: ignore[arg-type]
        _MODES[int(mode)], _PADDINGS[int(padding)], bool(align), "signed")  # type: ignore


def spatial(term: Term) -> tuple[Axis, ...]:
    """The axes along which the locations of a term vary and its value does not."""
    held = axes_of(term.sample.value[1])
    found: list[Axis] = []
    for _, layout in term.sample.locations:
        found += [a for dim in settle(layout) for a in dim if a not in held and a not in found]
    return tuple(a for a in found if a is not term.sample.coordinate)
