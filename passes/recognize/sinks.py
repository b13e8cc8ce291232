"""Sinks: a softmax over the scores and one more column, which is cut off again (GPT-OSS).

The column is a tensor that is joined to the scores, or a number that they are padded with.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

from torch import fx

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.passes.normalize import op_name
from attnopt.passes.recognize.axes import (
    Axis,
    Layout,
    broadcast,
    resolve,
    shape_of,
)
from attnopt.passes.recognize.pointwise import is_cast
from attnopt.passes.recognize.program import SOFTMAX, Program
from attnopt.passes.recognize.reader import Loaded
from attnopt.passes.recognize.roles import resolve_set

Operand = tuple[fx.Node, Layout]


@dataclass
class Sink:
    """softmax(cat([scores, sink]))[..., :K]: a logit without a value."""

    softmax: fx.Node
    layout: Layout
    keys: frozenset[Axis]
    scores: Operand
    logit: Expr
    operand: Loaded | None
    interior: list[fx.Node]


def sink_slice(program: Program, node: fx.Node, layout: Layout,
                keys: frozenset[Axis]) -> Sink | None:
    """Match the slice of a softmax over scores with extra columns; None where it is not that."""
    path: list[fx.Node] = []
    while True:
        if is_cast(node) or op_name(node) in ("contiguous", "clone") or (
                op_name(node) == "dropout" and not node.args[2]):
            path.append(node)
            node = node.args[0]  # type: ignore[assignment]
        else:
            break
    if op_name(node) != "slice" or not program.sources[node]:
        return None
    source, dim, *bounds = node.args
    softmax = source
    inner = [node]
    while isinstance(softmax, fx.Node) and (is_cast(softmax) or (
            op_name(softmax) == "dropout" and not softmax.args[2])):
        inner.append(softmax)
        softmax = softmax.args[0]
    if not isinstance(softmax, fx.Node) or op_name(softmax) not in SOFTMAX:
        return None
    rank = len(layout)
    at = dim % rank  # type: ignore[operator]
    if frozenset(resolve(layout[at])) != resolve_set(keys) or len(layout[at]) != 1:
        return None
    joined: fx.Node = softmax.args[0]  # type: ignore[assignment]
    while True:
        if is_cast(joined):
            inner.append(joined)
            joined = joined.args[0]  # type: ignore[assignment]
        elif op_name(joined) == "sub" and _is_row_max(joined.args[1], joined.args[0]):
            inner += [joined, joined.args[1]]  # type: ignore[list-item]
            joined = joined.args[0]  # type: ignore[assignment]
        else:
            break
    if op_name(joined) in ("pad", "constant_pad_nd"):
        return _padded(joined, bounds, softmax, layout, at, [*path, *inner, softmax, joined])
    if op_name(joined) not in ("cat", "concat") or len(joined.args[0]) != 2:  # type: ignore
        return None
    parts = list(joined.args[0])  # type: ignore[arg-type]
    cat_dim = (joined.args[1] if len(joined.args) > 1 else 0) % rank  # type: ignore[operator]
    sizes = [shape_of(p.meta["val"])[cat_dim] for p in parts]  # type: ignore[union-attr]
    key_size = layout[at][0].size
    start = bounds[0] if bounds else 0
    if cat_dim != at or (softmax.args[1] % rank) != at:  # type: ignore[operator]
        return None
    if sizes[1] == 1 and sizes[0] == key_size and start in (0, None):
        scores, logit = parts
    elif sizes[0] == 1 and sizes[1] == key_size and start == 1:
        logit, scores = parts
    else:
        return None
    assert isinstance(scores, fx.Node) and isinstance(logit, fx.Node)
    interior = [*path, *inner, softmax, joined]
    number = program.constant(logit)
    if number is not None and math.isfinite(number):
        return _sink(softmax, layout, at, scores, E.const(float(number)), None,
                     [*interior, logit])  # type: ignore[list-item]
    one = tuple(() if i == at else axes for i, axes in enumerate(layout))
    operand = Loaded(logit, broadcast(one, shape_of(logit.meta["val"])), "sink", E.FLOAT)
    return _sink(softmax, layout, at, scores, E.load("sink"), operand,
                 interior)  # type: ignore[arg-type]


def _sink(softmax: fx.Node, layout: Layout, at: int, scores: fx.Node, logit: Expr,
          operand: Loaded | None, interior: list[fx.Node]) -> Sink:
    wide = Axis(layout[at][0].size + 1)
    own = tuple((wide,) if i == at else axes for i, axes in enumerate(layout))
    return Sink(softmax, own, frozenset((wide,)), (scores, layout), logit, operand, interior)


def _padded(joined: fx.Node, bounds: list[object], softmax: fx.Node, layout: Layout, at: int,
            interior: list[object]) -> Sink | None:
    """softmax(pad(scores, (0, 1)))[..., :-1], or padded and cut in front."""
    scores, widths, *more = joined.args
    mode, value = ("constant", *more) if op_name(joined) == "constant_pad_nd" else (
        *more, *("constant", None)[len(more):])
    mode, value = joined.kwargs.get("mode", mode), joined.kwargs.get("value", value)
    value = 0.0 if value is None else value
    if mode != "constant" or not isinstance(value, int | float) or not math.isfinite(value) \
            or at != len(layout) - 1 or softmax.args[1] % len(layout) != at:  # type: ignore
        return None
    before, after, *others = widths  # type: ignore[misc]
    start = bounds[0] if bounds else 0
    cut = start in (0, None) if (before, after) == (0, 1) else (
        (before, after) == (1, 0) and start == 1)
    if any(others) or not cut:
        return None
    assert isinstance(scores, fx.Node)
    return _sink(softmax, layout, at, scores, E.const(float(value)), None,
                 interior)  # type: ignore[arg-type]


def _is_row_max(node: object, of: object) -> bool:
    """Is `node` the maximum of `of` along its last dimension?"""
    while isinstance(node, fx.Node) and op_name(node) in ("detach", "unsqueeze"):
        node = node.args[0]
    if isinstance(node, fx.Node) and node.target is operator.getitem:
        node = node.args[0]
    return (isinstance(node, fx.Node) and op_name(node) in ("max", "amax")
            and node.args[0] is of and len(node.args) > 1)
