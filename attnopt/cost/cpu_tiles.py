"""Tiles that the generated C++ kernel can have on a CPU.

A tile is (query rows, keys, MR, NV), or (query rows, keys, MR, NV, *box) where the rows are a box
of a grid and its keys are gathered (`attnopt.ir.halos`). The register block of MR rows x NV vectors
keeps MR * NV sums, NV vectors of one operand and one broadcast in registers; a larger one would
spill in the inner loop and is not listed. NV vectors must divide the key tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from attnopt.cost.devices import Cpu
from attnopt.ir.halos import Grid, boxes_of, seen_by_all
from attnopt.ir.mask import Mask

Tile = tuple[int, ...]
KEYS = (32, 64, 128)
#: rows of a tile, roughly: multiples of MR near these, from 16 to 192
ROWS = (24, 48, 96, 192)
FEWEST_ROWS = 16
#: register blocks that are considered for each shape
BLOCKS = 3
#: boxes that are considered, and those whose halos are counted where that is not a product of axes
BOXES, ASKED = 5, 3
#: queries of a box, and the rows that cost as much as gathering a key
MOST_ROWS, GATHERING = 112, 8


def fits(registers: int, mr: int, nv: int) -> bool:
    """Whether a register block stays in registers."""
    return mr * nv + nv + 1 <= registers


def register_blocks(registers: int) -> list[tuple[int, int]]:
    """(MR, NV) with the most multiply-adds per load, the best first.

    For each NV the largest even MR that fits, and the one near two thirds of it.
    """
    found: set[tuple[int, int]] = set()
    for nv in (1, 2, 4, 8):
        most = max(mr for mr in range(0, 17) if mr == 0 or fits(registers, mr, nv)) // 2 * 2
        found.update((mr, nv) for mr in (most, most * 2 // 3 // 2 * 2) if mr)
    ranked = sorted(found, key=lambda b: (-b[0] * b[1] / (b[0] + b[1]), b))
    return ranked[:BLOCKS] or [(1, 1)]


def cpu_tiles(device: Cpu, queries: int, keys: int, rows: Iterable[int] = ()) -> list[Tile]:
    """Legal tiles worth considering, in a fixed order; at least 12 for every shape.

    Few queries get tiles of no more rows than they fill, rounded up to MR. rows: of blocks that a
    mask is made of, which tiles should not straddle.
    """
    found: set[Tile] = set()
    for block_k in KEYS:
        vectors = block_k // device.width
        if queries < FEWEST_ROWS:
            found.update((-(-max(queries, 1) // mr) * mr, block_k, mr, nv)
                         for mr in (1, 2, 4, 8) for nv in (1, 2, 4, 8)
                         if vectors % nv == 0 and fits(device.registers, mr, nv)
                         and (mr <= queries or mr <= 2))
            continue
        for mr, nv in register_blocks(device.registers):
            if vectors % nv == 0:
                found.update((n, block_k, mr, nv) for n in (*_rows(mr), *rows))
    return sorted(found)


def _rows(mr: int) -> set[int]:
    return {max(min(round(rows / mr), ROWS[-1] // mr), -(-FEWEST_ROWS // mr)) * mr for rows in ROWS}


def best_boxes(mask: Mask, grid: Grid, registers: int) -> list[tuple[int, ...]]:
    """Boxes of a grid that compute the fewest scores, the best first; rows round up to MR."""
    blocks = register_blocks(registers)
    found = boxes_of(grid, MOST_ROWS)
    if grid.axes is None:
        found = [box for box in found if 32 <= math.prod(box) <= 64][:ASKED]
    costs: dict[tuple[int, ...], int] = {}
    for box in found:
        seen = seen_by_all(mask, grid, box)
        if seen is not None:
            rows = min(-(-math.prod(box) // mr) * mr for mr, _ in blocks)
            costs[box] = seen * (rows + GATHERING)
    return sorted(costs, key=lambda box: (costs[box], box))[:BOXES]


def boxed_tiles(device: Cpu, boxes: Iterable[tuple[int, ...]]) -> list[Tile]:
    """Tiles of kernels that gather the keys of these boxes."""
    found = []
    for box in boxes:
        for mr, nv in register_blocks(device.registers):
            rows = -(-math.prod(box) // mr) * mr
            if rows * 4 > math.prod(box) * 5:
                continue
            found += [(rows, block_k, mr, nv, *box) for block_k in KEYS
                      if block_k // device.width % nv == 0 and block_k >= nv * device.width]
    return found
