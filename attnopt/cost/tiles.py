"""Tiles that a mask visits: how many key tiles each query tile reads, and how many need the mask.

Most masks are counted through `attnopt.ir.intervals`. A neighbourhood or a partition of a grid, cut
into boxes of that grid, is the product of its axes, and so are its counts: a query box visits the
product of what it visits along each axis. That costs the sum of the axes, so that many tile shapes
can be compared.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.axis_tables import axis_states
from attnopt.ir.halos import halo_sizes
from attnopt.ir.intervals import EMPTY, FULL, PARTIAL, tile_states
from attnopt.ir.mask import ALL, Mask, Neighborhood, Windows
from attnopt.ir.tiling import GridTile, Tiling, tile_count


@dataclass(frozen=True)
class TileCounts:
    """Key tiles by query tile.

    full, partial: int64 (*L or 1, query tiles): how many need no mask, how many need it
    key_tiles:     all key tiles of a row
    """

    full: Tensor
    partial: Tensor
    key_tiles: int

    @property
    def visited(self) -> Tensor:
        return self.full + self.partial

    @property
    def worst(self) -> int:
        """Most key tiles that a query tile visits."""
        return int(self.visited.max()) if self.visited.numel() else 0

    @property
    def total(self) -> int:
        """Pairs of tiles, of all leading entries that are counted apart."""
        return self.visited.numel() * self.key_tiles

    @property
    def density(self) -> float:
        """Share of the pairs of tiles that is visited."""
        return int(self.visited.sum()) / max(self.total, 1)

    @property
    def full_share(self) -> float:
        """Share of the visited tiles that needs no mask."""
        return int(self.full.sum()) / max(int(self.visited.sum()), 1)

    @property
    def speedup(self) -> float:
        """Dense over visited tiles, by the query tile that visits most: NATTEN's simulator."""
        return self.key_tiles / max(self.worst, 1)

    def thinned(self, share: float) -> TileCounts:
        """The counts where about this share of all key tiles is visited."""
        most = math.ceil(share * self.key_tiles)
        partial = self.partial.clamp(max=most)
        return TileCounts((most - partial).minimum(self.full), partial, self.key_tiles)

    @property
    def average_speedup(self) -> float:
        return 1 / max(self.density, 1 / max(self.total, 1))


def count_tiles(mask: Mask, queries: int, keys: int, tile_q: Tiling, tile_k: Tiling,
                leading: Sequence[int] = (), operands: Mapping[str, Tensor] | None = None,
                *, tail: bool = False) -> TileCounts:
    """Tiles that `mask` visits; operands that are not given are taken to hide no whole tile.

    tile_q, tile_k: tokens of a tile, or boxes of a grid (`GridTile`)
    tail: a key tile that the end of the keys cuts off needs a mask, as it does in most kernels
    """
    columns = tile_count(tile_k, keys)
    if mask == ALL:
        cut = _cut(tile_k, keys).sum() if tail else 0
        shape = (*[1] * len(leading), tile_count(tile_q, queries))
        partial = torch.zeros(shape, dtype=torch.int64) + cut
        return TileCounts(columns - partial, partial, columns)
    axes = axis_states(mask, queries, keys, tile_q, tile_k)
    if axes is not None:
        visited = _outer([(states != EMPTY).sum(-1) for states in axes])
        if tail and isinstance(tile_k, GridTile):
            for states, n, t in zip(axes, tile_k.length, tile_k.shape, strict=True):
                states.masked_fill_(_cut(t, n) & (states == FULL), PARTIAL)
        full = _outer([(states == FULL).sum(-1) for states in axes])
        return TileCounts(full, visited - full, columns)
    states = tile_states(mask.predicate(), queries, keys, tile_q, tile_k, leading, operands,
                         missing=True)
    if tail:
        cut = _cut(tile_k, keys).to(states.device)
        states = states.masked_fill(cut & (states == FULL), PARTIAL)
    return TileCounts((states == FULL).sum(-1), (states == PARTIAL).sum(-1), columns)


def count_halos(mask: Mask, queries: int, keys: int, box: tuple[int, ...], block_k: int,
                leading: Sequence[int] = ()) -> TileCounts | None:
    """Key tiles that each box of queries visits where its keys are gathered, first those that no
    row hides; None where the mask has no halos."""
    sizes = halo_sizes(mask, queries, keys, box, tuple(leading))
    if sizes is None:
        return None
    full = sizes[1] // block_k
    return TileCounts(full, -(-sizes[0] // block_k) - full, -(-keys // block_k))


def _cut(tiling: Tiling, tokens: int) -> Tensor:
    """bool (tiles,): those that the end of an axis cuts off."""
    grid = tiling if isinstance(tiling, GridTile) else GridTile((tokens,), (tiling,))
    cut = torch.zeros(1, dtype=torch.bool)
    for n, t in zip(grid.length, grid.shape, strict=True):
        own = torch.arange(1, -(-n // t) + 1) * t > n
        cut = (cut[:, None] | own).flatten()
    return cut


def _outer(counts: Sequence[Tensor]) -> Tensor:
    """Products of one entry per axis, over all query boxes in row-major order."""
    return functools.reduce(lambda a, b: (a[:, None] * b).flatten(), counts)


def ideal_density(mask: Mask, queries: int, keys: int) -> float | None:
    """Share of the scores that a neighbourhood or a partition keeps, None for another mask."""
    if isinstance(mask, Neighborhood):
        if any(mask.causal):
            return None
        return math.prod(mask.window) / max(keys, 1)
    if isinstance(mask, Windows) and all(w.op == "const" for w in mask.window):
        return min(1.0, math.prod(int(w.value) for w in mask.window) / max(keys, 1))
    return 1.0 if mask.predicate() is E.TRUE else None
