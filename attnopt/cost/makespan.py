"""When the last of many tasks is done, if each of some units takes the next task once it is free.

GPU blocks are handed out like this, and so are the query tiles of a CPU kernel to its threads.
The rounding up to whole waves that it contains is the largest effect below some four waves.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

#: tasks that are scheduled one by one; with more, their order matters less than the model's error
MOST = 1 << 14


def makespan(costs: Tensor | Sequence[float], units: int, repeat: int = 1) -> float:
    """Time until `repeat` rounds of tasks of these costs, in order, are done on `units` units."""
    given = torch.as_tensor(costs, dtype=torch.float64).flatten()
    total = float(given.sum()) * repeat
    if units < 1:
        raise ValueError(f"units must be positive, got {units}")
    if units == 1 or not given.numel():
        return total
    longest, shortest = float(given.max()), float(given.min())
    if longest == shortest:
        return -(-given.numel() * repeat // units) * longest
    if given.numel() * repeat > MOST:
        # What is left of the last wave is half a task of an average unit.
        return total / units + float(given.mean()) / 2
    free = [0.0] * min(units, given.numel() * repeat)
    for cost in given.tolist() * repeat:
        heapq.heapreplace(free, free[0] + cost)
    return max(free)
