"""How the tokens of an axis fall into tiles: runs of equal length, or boxes of a row-major grid.

A tiling is an int (runs of that many tokens, the last one may be shorter) or a `GridTile` (boxes,
in row-major order of the boxes, those at the far edges may be smaller).
"""

from __future__ import annotations

import functools
import itertools
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GridTile:
    """Boxes of `shape` that tile a row-major grid of `length` from its origin."""

    length: tuple[int, ...]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.length) != len(self.shape) or not self.shape:
            raise ValueError(f"shape must have {len(self.length)} axes, got {self.shape}")
        if min(self.length) < 0 or min(self.shape) < 1:
            raise ValueError(f"shape must be positive, got {self.shape} of {self.length}")

    @property
    def counts(self) -> tuple[int, ...]:
        """Boxes along every axis."""
        return tuple(-(-n // t) for n, t in zip(self.length, self.shape, strict=True))

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        return "x".join(map(str, self.shape))


Tiling = int | GridTile


def tile_count(tiling: Tiling, tokens: int) -> int:
    """Tiles that `tokens` tokens fall into."""
    return math.prod(tiling.counts) if isinstance(tiling, GridTile) else -(-tokens // tiling)


def tile_size(tiling: Tiling) -> int:
    """Tokens of a tile that is not cut off."""
    return tiling.size if isinstance(tiling, GridTile) else tiling


def members(tiling: Tiling, tokens: int, device: torch.device | None = None) -> Tensor:
    """(tiles, tokens of a tile) int64: the tokens of every tile.

    A tile that is cut off lists some of its own tokens twice, which minimum, maximum, any and all
    do not see.
    """
    grid = tiling if isinstance(tiling, GridTile) else GridTile((tokens,), (tiling,))
    if math.prod(grid.length) != tokens:
        raise ValueError(f"length must have {tokens} tokens, got {grid.length}")
    shape = (math.prod(grid.counts), grid.size)
    if not tokens:
        return torch.zeros(shape, dtype=torch.int64, device=device)
    if device is not None and device.type != "cpu":
        return _computed(grid, device)
    return torch.frombuffer(_places(grid), dtype=torch.int64).view(shape).to(device)


def _computed(grid: GridTile, device: torch.device) -> Tensor:
    """`members` by arithmetic on a device, which a copy would have to wait for."""
    found = torch.zeros((1, 1), dtype=torch.int64, device=device)
    for n, side, count in zip(grid.length, grid.shape, grid.counts, strict=True):
        own = torch.arange(count * side, device=device).clamp(max=n - 1).view(count, side)
        found = (found[:, None, :, None] * n + own[None, :, None, :]).flatten(2).flatten(0, 1)
    return found


@functools.lru_cache(maxsize=32)
def _places(grid: GridTile) -> array[int]:
    """Flat `members`. Numbers, not a tensor: what is kept must not belong to a tracing mode."""
    axes = [[[min(i * t + j, n - 1) for j in range(t)] for i in range(-(-n // t))]
            for n, t in zip(grid.length, grid.shape, strict=True)]
    tiles = axes[0]
    for n, axis in zip(grid.length[1:], axes[1:], strict=True):
        tiles = [[a * n + b for a in outer for b in own] for outer in tiles for own in axis]
    return array("q", itertools.chain.from_iterable(tiles))


def tilings_of(length: Sequence[int], size: int) -> list[GridTile]:
    """Boxes of powers of two with `size` tokens, none longer than its axis needs."""
    shapes: list[tuple[int, ...]] = [()]
    for i, n in enumerate(length):
        last = i == len(length) - 1
        grown = []
        for shape in shapes:
            rest = size // math.prod(shape)
            sides = [rest] if last else [1 << e for e in range(rest.bit_length())]
            grown += [(*shape, t) for t in sides if rest % t == 0 and t < 2 * max(n, 1)]
        shapes = grown
    return [GridTile(tuple(length), shape) for shape in shapes]
