"""Minimum and maximum of a table over many boxes of its indices at once.

A sparse table: level l along an axis holds the minimum of the 2**l entries from each place on, and
any range is covered by two overlapping entries of one level. Building it costs the table times
its levels, a query 2**axes look-ups, whatever the size of the box.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: Entries of a sparse table; above it the extremes of the whole table answer every box.
LARGEST = 1 << 24


def box_extremes(low: Tensor, high: Tensor, first: Sequence[Tensor], last: Sequence[Tensor],
                 ) -> tuple[Tensor, Tensor]:
    """(min of `low`, max of `high`) over first[a] <= index along axis a <= last[a].

    low, high: tables of one shape. first, last: for every axis int64 tensors that broadcast
    against each other; places outside of the table mean the nearest entry. The results have the
    broadcast shape.
    """
    shape = torch.broadcast_shapes(*(t.shape for t in (*first, *last)), ())
    if not math.prod(shape):
        return low.new_empty(shape), high.new_empty(shape)
    starts, ends, levels = [], [], []
    for n, a, b in zip(low.shape, first, last, strict=True):
        start, end = a.clamp(0, n - 1), b.clamp(0, n - 1)
        starts.append(start)
        ends.append(end)
        # frexp counts the bits of a positive integer exactly, log2 does not promise to
        levels.append(torch.frexp((end - start + 1).double()).exponent.long() - 1)
    deepest = [int(level.max()) for level in levels]
    if low.numel() * math.prod(d + 1 for d in deepest) > LARGEST:
        return low.min().expand(shape), high.max().expand(shape)
    return tuple(  # type: ignore[return-value]
        _query(_build(table, deepest, pick), starts, ends, levels, deepest, pick).expand(shape)
        for table, pick in ((low, torch.minimum), (high, torch.maximum)))


def _build(table: Tensor, deepest: Sequence[int],
           pick: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """(levels of the last axis, …, levels of the first, *table.shape)."""
    for axis, depth in enumerate(deepest):
        place = table.dim() - len(deepest) + axis
        n = table.shape[place]
        stack = [table]
        for level in range(depth):
            ahead = torch.arange(n, device=table.device).add(1 << level).clamp(max=n - 1)
            stack.append(pick(stack[-1], stack[-1].index_select(place, ahead)))
        table = torch.stack(stack)
    return table


def _query(table: Tensor, starts: Sequence[Tensor], ends: Sequence[Tensor],
           levels: Sequence[Tensor], deepest: Sequence[int],
           pick: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    found = None
    corners = []
    for start, end, level, depth in zip(starts, ends, levels, deepest, strict=True):
        back = end + 1 - (torch.ones_like(level) << level)
        corners.append((start, back) if depth else (start,))
    for corner in itertools.product(*corners):
        here = table[(*reversed(levels), *corner)]
        found = here if found is None else pick(found, here)
    assert found is not None
    return found
