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
    settle,
    shape_of,
)
from attnopt.passes.recognize.program import Program
from attnopt.passes.recognize.sampling_places import Places
from attnopt.passes.recognize.sampling_sums import Sample
from attnopt.passes.recognize.sampling_texels import counted
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
    places, bases = Places(program.constant), []
    for size, index in zip(shape[2:], indices[2:], strict=True):
        if not isinstance(size, int) or size > LARGEST:
            raise Decline("the size of a grid is not known", node)
        bases.append(places.within(index, _own(index, where), size))
    locations, coordinate, order = places.locations(tuple(bases), node)
    return Sample(node, (value, (batch, channels, *((a,) for a in space))), space, locations,
                  coordinate, "nearest", "border", False, "texels", order=order)


def _own(index: fx.Node, where: list[tuple[Axis, ...]]) -> Layout:
    return settle(broadcast(tuple(where), shape_of(index.meta["val"])))
