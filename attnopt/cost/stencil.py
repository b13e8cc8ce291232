"""Time of the generated C++ stencil on a CPU.

A stencil takes W queries of one grid row in the lanes of a vector, several grid rows at a time, and
computes the scores of their windows alone. Its time is a sum of counted features times coefficients
in nanoseconds, as in `attnopt.cost.cpu`, whose names these extend with "stencil.":

    fma     vectors of multiply-adds of both products
    select  vectors of keys and values whose lanes are selected, for all grid rows that share them
    row     vectors of keys and values that are read, by pairs of panels
    score   vectors of scores: maximum, exponential, sum;  op: instructions of the Spec on them
    token   elements of tensors that change between token rows and lanes
    far     KB of tensors beyond the second-level cache, read or written once
    block   groups of W queries of some grid rows
    call    calls;  thread: threads that are woken (that of the tiled kernel)

Lanes beyond the end of a grid row count in full, so short rows are dear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attnopt.cost import cpu
from attnopt.cost.devices import Cpu
from attnopt.cost.work import Work

#: nanoseconds by feature where a device has none; of a 2.5 GHz core with two AVX-512 units
COEFFICIENTS: Mapping[str, float] = {
    "stencil.fma": 0.28, "stencil.select": 0.38, "stencil.row": 1.8, "stencil.score": 6.9,
    "stencil.op": 0.61, "stencil.token": 1.3, "stencil.far": 5.2, "stencil.block": 32.0,
    "stencil.call": 65000.0,
}
#: instructions that select lanes of two vectors: one where there are 32 registers (AVX-512)
SELECT, SELECT_NARROW = 1.0, 4.0


@dataclass(frozen=True)
class Grid:
    """A grid z x y x x and its windows.

    length: of the axes; window: keys along them, of the query that has most;
    shared: grid rows along y that a group of `rows` grid rows keeps between them, on average
    """

    length: tuple[int, int, int]
    window: tuple[int, int, int]
    shared: float
    rows: int = 4


def grid_of(windows: Sequence[Sequence[tuple[int, int]]], rows: int) -> Grid:
    """The Grid of windows (start, count) of every coordinate along z, y and x, in their walk."""
    z, y, x = windows
    groups = -(-len(y) // rows)
    shared = 0
    for g in range(groups):
        own = y[g * len(y) // groups:(g + 1) * len(y) // groups]
        shared += len({k for start, count in own for k in range(start, start + count)})
    most = [max(count for _, count in axis) for axis in (z, y, x)]
    return Grid((len(z), len(y), len(x)), (most[0], most[1], most[2]), shared / groups, rows)


def features(device: Cpu, work: Work, grid: Grid) -> dict[str, float]:
    """Features of a whole call by one thread."""
    depth, rows, columns = grid.length
    groups, per_row = -(-rows // grid.rows), -(-columns // device.width)
    blocks = work.leading * depth * groups * per_row
    taps, channels = grid.window[2], work.head_dim + work.value_dim
    entries = grid.window[0] * grid.shared  # rows of keys of a block
    cells = grid.window[0] * grid.window[1] * taps * rows / groups  # vectors of scores of a block
    select = SELECT if device.registers >= 32 else SELECT_NARROW
    moved = work.tensor_bytes
    tokens = depth * rows * columns
    return {
        "stencil.fma": blocks * cells * channels,
        "stencil.select": blocks * entries * taps * channels * select,
        "stencil.row": blocks * entries * 2.0 * channels,
        "stencil.score": blocks * cells,
        "stencil.op": blocks * cells * work.score_ops,
        "stencil.token": float((work.leading + work.owners) * tokens * channels),
        "stencil.far": max(0.0, moved - device.l2) / 1024,
        "stencil.block": float(blocks),
        "stencil.call": 1.0,
    }


def seconds(device: Cpu, work: Work, grid: Grid, threads: int = 1) -> float:
    """Predicted time of a call."""
    given = {**cpu.COEFFICIENTS, **COEFFICIENTS, **device.coefficients}
    counted = features(device, work, grid)
    once = given["stencil.call"]
    shared = sum(given[name] * n for name, n in counted.items() if name != "stencil.call")
    if threads > 1:
        tasks = max(1.0, counted["stencil.block"])
        # Blocks are taken as threads become free; the last ones leave some of them idle.
        shared = shared * -(-tasks // threads) / tasks
        once += threads * given["thread"]
    return 1e-9 * (once + shared)
