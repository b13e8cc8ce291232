"""Parts of one tensor, put back: what the levels of a sampling have been cut from.

Models cut values, locations and weights into levels (split, select, slice, unbind) before they
sample. `trace` walks one part back over such cuts and over layout operations, and over factors and
offsets that are numbers; `join` finds the tensor that all parts come from, if they are all of it in
order. The rewrite then reads that tensor and copies nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from attnopt.passes.normalize import _MULTI, is_tensor, op_name
from attnopt.passes.recognize.axes import (
    Axis,
    Layout,
    product,
    resolve,
    same_length,
    settle,
    shape_of,
)
from attnopt.passes.recognize.layout import back
from attnopt.passes.recognize.program import Program
from attnopt.passes.recognize.sampling_sums import Pick
from attnopt.rules import Decline


@dataclass(frozen=True)
class Step:
    """A tensor, its layout, which part of its axes is meant, and scale * tensor + offset of it."""

    node: fx.Node
    layout: Layout
    picks: Mapping[Axis, Pick] = field(default_factory=dict)
    scale: float = 1.0
    offset: float = 0.0


@dataclass(frozen=True)
class Levels:
    """The axis of all levels, and what each level is of it.

    whole:  (level, *points) where all have as many points, else one axis of all of them
    pieces: the axes of each level
    level:  the axis of levels, None where they are of unequal size
    """

    whole: tuple[Axis, ...]
    pieces: tuple[tuple[Axis, ...], ...]
    starts: tuple[int, ...]
    level: Axis | None


def trace(program: Program, start: Step, *, affine: bool = False) -> list[Step]:
    """`start` and the tensors that it is a rearranged part of, the nearest first.

    affine: numbers that are multiplied and added are walked over as well
    """
    found = [start]
    while True:
        try:
            step = _before(program, found[-1], affine)
        except Decline:
            return found
        if step is None:
            return found
        found.append(step)


def _before(program: Program, step: Step, affine: bool) -> Step | None:
    node = step.node
    if node.op != "call_function" or node.meta.get("attnopt_opaque"):
        return None
    before = moved(node, step.layout)
    if before is not None:
        return replace(step, node=before[0], layout=settle(before[1]))
    part = cut(node)
    if part is not None:
        source, dim, start, kept = part
        size = shape_of(source.meta["val"])[dim]
        layout = list(settle(step.layout))
        axes = layout[dim] if kept else ()
        picks = step.picks
        whole: tuple[Axis, ...] = (Axis(size),)
        if same_length(size, 1):
            whole = ()
        elif picks:
            return None
        else:
            picks = {whole[0]: Pick(start, axes)}
        layout[dim:dim + kept] = [whole]
        return replace(step, node=source, layout=tuple(layout), picks=picks)
    return _affine(program, step) if affine else None


def moved(node: fx.Node, layout: Layout) -> tuple[fx.Node, Layout] | None:
    """The tensor that `node` is all of and its layout: `back`, also over x[:] of any length."""
    if node.op == "call_function" and op_name(node) == "slice" \
            and (part := cut(node)) is not None and same_length(
                shape_of(part[0].meta["val"])[part[1]], shape_of(node.meta["val"])[part[1]]):
        return part[0], layout
    return back(node, layout)


def cut(node: fx.Node) -> tuple[fx.Node, int, int, int] | None:
    """(tensor, dim, start, 1 if the dimension is kept) of a select, slice or piece of a split."""
    source: Any = node.args[0] if node.args else None
    name = op_name(node)
    if node.target is operator.getitem and isinstance(source, fx.Node) \
            and op_name(source) in _MULTI:
        number, parts = node.args[1], source
        source = parts.args[0]
        if not is_tensor(source) or not isinstance(number, int):
            return None
        at = 1 if op_name(parts) == "unbind" else 2
        dim: Any = parts.args[at] if len(parts.args) > at else parts.kwargs.get("dim", 0)
        if at == 1:
            return source, dim % source.meta["val"].dim(), number, 0
        lengths = [shape_of(p)[dim] for p in parts.meta["val"]]
        start: Any = sum(lengths[:number])
        known = isinstance(start, int)
        return (source, dim % source.meta["val"].dim(), start, 1) if known else None
    if name not in ("select", "slice", "narrow") or not is_tensor(source):
        return None
    dim = (node.args[1] if len(node.args) > 1 else 0)
    dim = dim % source.meta["val"].dim()
    start = (node.args[2] if len(node.args) > 2 else 0) or 0
    size = shape_of(source.meta["val"])[dim]
    if not isinstance(start, int) or not isinstance(size, int) and start < 0:
        return None
    start = start + size if start < 0 else start
    if name == "slice" and len(node.args) > 4 and node.args[4] != 1:
        return None
    return source, dim, start, int(name != "select")


def _affine(program: Program, step: Step) -> Step | None:
    """y = x * c, x / c, x + c, x - c, c - x with a number c, read as scale and offset of x."""
    node, name = step.node, op_name(step.node)
    if name not in ("mul", "div", "add", "sub", "rsub") or len(node.args) < 2 \
            or node.kwargs.get("rounding_mode") is not None or node.kwargs.get("alpha", 1) != 1 \
            or len(node.args) > 2:
        return None
    for source, other in (node.args[:2], node.args[1::-1]):
        number = program.constant(other) if isinstance(other, fx.Node) else other
        if not is_tensor(source) or isinstance(number, bool) or number is None \
                or not isinstance(number, (int, float)):
            continue
        assert isinstance(source, fx.Node)
        if shape_of(source.meta["val"]) != shape_of(node.meta["val"]) \
                or source.meta["val"].dtype != node.meta["val"].dtype:
            return None
        first = source is node.args[0]
        a, b = step.scale, step.offset
        if name == "mul":
            return replace(step, node=source, scale=a * number)
        if name == "div" and first and number != 0:
            return replace(step, node=source, scale=a / number)
        if name == "add":
            return replace(step, node=source, offset=b + a * number)
        if name in ("sub", "rsub"):
            plain = (name == "sub") == first
            return replace(step, node=source, scale=a if plain else -a,
                           offset=b - a * number if plain else b + a * number)
        return None
    return None


def join(traces: Sequence[Sequence[Step]], levels: Levels) -> Step | None:
    """The nearest tensor of which the traces' starts are all of the levels, in order."""
    for first in traces[0]:
        others = [[s for s in steps if s.node is first.node] for steps in traces[1:]]
        if not all(others):
            continue
        steps = [first, *(o[0] for o in others)]
        if len({(s.scale, s.offset) for s in steps}) == 1 and _whole(steps, levels):
            return replace(first, layout=settle(first.layout), picks={})
    return None


def _whole(steps: Sequence[Step], levels: Levels) -> bool:
    """Are the steps the levels of one tensor? Their axes are then made the same."""
    targets: list[tuple[Axis, tuple[Axis, ...]]] = []
    shapes = []
    for i, step in enumerate(steps):
        shapes.append(tuple(tuple(None if a in step.picks else a for a in dim)
                            for dim in settle(step.layout)))
        for axis, pick in step.picks.items():
            if axis.parts is not None:
                return False
            own = resolve(pick.axes)
            if not own and levels.level is not None and pick.start == i:
                targets.append((axis, (levels.level,)))
            elif pick.start == levels.starts[i] and own == resolve(levels.pieces[i]):
                targets.append((axis, levels.whole))
            else:
                return False
    if len(set(shapes)) != 1 or len(targets) not in (0, len(steps)):
        return False
    if any(not same_length(axis.size, product(target)) for axis, target in targets):
        return False
    for axis, target in targets:
        axis.become(target)
    return True


def furthest(steps: Sequence[Step], usable: Callable[[Step], bool]) -> Step | None:
    """The last of the steps that is a whole tensor and usable."""
    good = [s for s in steps if not s.picks and usable(s)]
    return good[-1] if good else None

