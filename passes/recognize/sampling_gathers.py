"""Samples that are taken by indices: value[batch, :, y, x] with whole numbers of texels.

The nearest texel, as RT-DETRv2's "discrete" sampling has it (arXiv 2407.17140): coordinates are
rounded and clamped to the grid, and an advanced index reads the texels. The op takes the author's
own whole numbers as locations, in texels, so that rounding and ties stay the author's. Taken are
indices that count the batch, and coordinates that a clamp keeps within their axis: a negative index
would count from the other end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from attnopt.passes.normalize import is_tensor, op_name
from attnopt.passes.recognize.axes import (
    Axis,
    Layout,
    broadcast,
    product,
    resolve,
    same_length,
    settle,
    shape_of,
)
from attnopt.passes.recognize.layout import back
from attnopt.passes.recognize.program import Program
from attnopt.passes.recognize.sampling_sums import Operand, Sample
from attnopt.rules import Decline

#: grids up to this size have coordinates that float32 holds exactly
LARGEST = 1 << 24


def is_lookup(node: fx.Node) -> bool:
    """Is `node` value[i, :, y, x] with tensors i, y and x of whole numbers?"""
    if op_name(node) != "index" or not is_tensor(node.args[0]):
        return False
    indices: Any = node.args[1]
    if len(indices) not in (4, 5) or indices[1] is not None:
        return False
    return all(is_tensor(x) and x.meta["val"].dtype in (torch.int64, torch.int32)
               for i, x in enumerate(indices) if i != 1)


def lookup(program: Program, node: fx.Node, layout: Layout) -> Sample:
    """value[batch, :, y, x]; its result has the dimensions of the indices, then the channels."""
    value: Any = node.args[0]
    indices: Any = node.args[1]
    shape = shape_of(value.meta["val"])
    *where, channels = layout
    batch = counted(indices[0], _own(indices[0], where), shape[0])
    space = tuple(Axis(n) for n in shape[2:])
    locations = []
    for size, index in reversed(list(zip(shape[2:], indices[2:], strict=True))):
        if not isinstance(size, int) or size > LARGEST:
            raise Decline("the size of a grid is not known", node)
        locations.append(_clamped(index, _own(index, where), size))
    return Sample(node, (value, (batch, channels, *((a,) for a in space))), space,
                  tuple(locations), None, "nearest", "border", False, "texels")


def _own(index: fx.Node, where: list[tuple[Axis, ...]]) -> Layout:
    return settle(broadcast(tuple(where), shape_of(index.meta["val"])))


def counted(node: fx.Node, layout: Layout, size: Any) -> tuple[Axis, ...]:
    """The axes that an index of the batch counts: 0, 1, 2 … along them."""
    while True:
        step = back(node, layout) if node.op == "call_function" else None
        if step is None:
            break
        node, layout = step
    name = op_name(node) if node.op == "call_function" else ""
    first = node.args[0] if len(node.args) > 1 else 0
    if name != "arange" or first != 0 or len(node.args) > 2 and node.args[2] != 1:
        raise Decline("the batch of a look-up is not counted", node)
    axes = resolve(settle(layout)[0])
    if not same_length(product(axes), size):
        raise Decline("a look-up reads a part of the batch", node)
    return axes


def _clamped(node: fx.Node, layout: Layout, size: int) -> Operand:
    """The coordinate where it is clamped to 0 … size - 1."""
    start, picked = node, dict[Axis, int]()
    while node.op == "call_function":
        name = op_name(node)
        if name in ("clamp", "clip") and clamp_bounds(node) == (0, size - 1):
            return node, settle(layout)
        step = back(node, layout)
        if step is not None:
            node, layout = step[0], settle(step[1])
        elif name == "select":
            source, dim, number = node.args[:3]
            at = dim % (len(layout) + 1)  # type: ignore[operator]
            axis = Axis(shape_of(source.meta["val"])[at])  # type: ignore[union-attr]
            if not isinstance(number, int) or not isinstance(axis.size, int):
                break
            picked[axis] = number % axis.size
            node, layout = source, (*layout[:at], (axis,), *layout[at:])  # type: ignore
        elif name == "stack":
            parts: Any = node.args[0]
            dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
            at = dim % len(layout)  # type: ignore[operator]
            if len(layout[at]) != 1 or layout[at][0] not in picked:
                break
            node = parts[picked.pop(layout[at][0])]
            layout = (*layout[:at], *layout[at + 1:])
        else:
            break
    raise Decline("a coordinate that is not clamped to the grid", start)


def clamp_bounds(node: fx.Node) -> tuple[Any, Any]:
    low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min")
    high = node.args[2] if len(node.args) > 2 else node.kwargs.get("max")
    return low, high
