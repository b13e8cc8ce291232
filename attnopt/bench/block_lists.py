"""How long it takes to find the tiles that a window on a grid visits, and how much memory.

Ours are the lists of full and partial tiles of a generated kernel, from tables along the axes of
the grid. The peer is FlexAttention's create_block_mask in eager mode, which asks the mask about
every score; its tokens are numbered box by box, so that its blocks of 128 are the same boxes and
its counts can be compared with ours.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnopt.bench import memory
from attnopt.bench.side_by_side import OURS, ratio
from attnopt.ir.axis_tables import mask_states
from attnopt.ir.intervals import EMPTY, FULL, TileLists, tile_lists
from attnopt.ir.mask import Neighborhood
from attnopt.ir.tiling import GridTile, members
from attnopt.timing import interleave

PEER = "create_block_mask"
#: up to so many tokens the peer is timed as often as ours, beyond once
_SHORT = 4096


@dataclass(frozen=True)
class Lists:
    """A window on a grid cut into boxes. limits: seconds and bytes that must not be exceeded."""

    name: str
    length: tuple[int, ...]
    window: tuple[int, ...]
    tile: tuple[int, ...] = (2, 8, 8)
    peer: bool = True
    goals: dict[str, tuple[float, float]] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)

    @property
    def mask(self) -> Neighborhood:
        return Neighborhood(self.window, length=self.length)

    @property
    def boxes(self) -> GridTile:
        return GridTile(self.length, self.tile)

    @property
    def tokens(self) -> int:
        return int(torch.tensor(self.length).prod())


def cases(quick: bool = False, full: bool = False) -> list[Lists]:
    """A video of 115,200 tokens (HunyuanVideo) alone, smaller ones beside create_block_mask."""
    if quick:
        return [Lists("block lists", (4, 8, 16), (3, 5, 5))]
    found = [
        Lists("block lists 115200", (30, 48, 80), (18, 24, 24), peer=False,
              limits={"seconds": 0.050, "peak_bytes": 50e6}),
        Lists("block lists 4096", (4, 32, 32), (3, 13, 13)),
    ]
    if full:
        found.append(Lists("block lists 16384", (16, 32, 32), (5, 13, 13),
                           goals={PEER: (1000, 10000)}))
    return found


def run(case: Lists, repeats: int) -> dict[str, Any]:
    """One row."""
    place = torch.device("cpu")
    ours: Callable[[], TileLists] = lambda: tile_lists(_states(case))  # noqa: E731
    peak = memory.peak(ours, place)
    times = interleave({OURS: ours}, max(repeats, 5))[OURS]
    seconds = statistics.median(times)
    states = _states(case)
    contestants: dict[str, Any] = {OURS: {"seconds": seconds, "peak_bytes": peak}}
    ratios, found = {}, {}
    if case.peer:
        theirs, made, slow = _peer(case), [], []

        def timed() -> None:
            start = time.process_time()
            made.append(theirs())
            slow.append(time.process_time() - start)

        peer_peak = memory.peak(timed, place)
        for _ in range(repeats - 1 if case.tokens <= _SHORT else 0):
            timed()
        contestants[PEER] = {"seconds": statistics.median(slow), "peak_bytes": peer_peak}
        ratios[PEER] = ratio(slow, [seconds] * len(slow), case.goals.get(PEER))
        found["same_tiles"] = _counts(made[0]) == (
            int((states == FULL).sum()), int((states != EMPTY).sum()))
    measured = contestants[OURS]
    return {
        "shape": f"N{case.tokens} {_by(case.length)} w{_by(case.window)} tile {_by(case.tile)}",
        "dtype": "-", "training": False, "device": "cpu", "threads": 1, "rounds": repeats,
        "clock": "cpu", "ours": {"status": "tile lists"}, "contestants": contestants,
        "left_out": {}, "ratios": ratios, **found,
        "limits": {name: {"must_not_exceed": most, "missed": (measured[name] or 0) > most}
                   for name, most in case.limits.items()},
    }


def _states(case: Lists) -> Tensor:
    return mask_states(case.mask, case.tokens, case.tokens, case.boxes, case.boxes)


def _peer(case: Lists) -> Callable[[], Any]:
    from torch.nn.attention.flex_attention import create_block_mask

    if any(n % t for n, t in zip(case.length, case.tile, strict=True)):
        raise ValueError(f"tile must divide the grid {case.length}, got {case.tile}")
    token = members(case.boxes, case.tokens).flatten()
    axes, inside = [], case.tokens
    for length, window in zip(case.length, case.window, strict=True):
        inside //= length
        place = token // inside % length
        axes.append((place, (place - window // 2).clamp(0, length - window), window))

    def keep(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        kept = q >= 0
        for place, start, window in axes:
            kept = kept & (place[k] >= start[q]) & (place[k] < start[q] + window)
        return kept

    size = case.boxes.size
    return lambda: create_block_mask(keep, None, None, case.tokens, case.tokens, device="cpu",
                                     BLOCK_SIZE=size)


def _counts(blocks: Any) -> tuple[int, int]:
    """(full, visited) blocks of a BlockMask."""
    full = int(blocks.full_kv_num_blocks.sum())
    return full, full + int(blocks.kv_num_blocks.sum())


def _by(lengths: tuple[int, ...]) -> str:
    return "x".join(map(str, lengths))
