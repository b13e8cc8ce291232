"""The lists of a kernel that gathers: boxes of queries, and the keys of their halos in key tiles.
"""

from __future__ import annotations

import functools

import torch

from attnopt.ir.halos import halos
from attnopt.ir.mask import Mask
from attnopt.kernels.cpp.call import Gathers
from attnopt.kernels.cpp.template import Tile


@functools.lru_cache(maxsize=64)
def gathers(mask: Mask, rows: int, keys: int, tile: Tile, leads: tuple[int, ...]
            ) -> Gathers | None:
    """The query tiles of a mask at these lengths; None where its halos are not listed.

    Keys that no row hides come first, so that whole key tiles of them need no mask.
    """
    with torch.inference_mode(False):
        found = halos(mask, rows, keys, tile.box, leads)
        if found is None or found.order.shape[1] > tile.rows:
            return None
        seen = found.starts.diff(dim=-1)
        tiles = -(-seen // tile.keys)
        ends = tiles.flatten().cumsum(0).view(tiles.shape)
        starts = torch.cat([ends - tiles, ends[..., -1:]], -1)
        # Each key moves on by what the key tiles before its own left open.
        opened = ((ends - tiles) * tile.keys - found.starts[..., :-1]).flatten()
        places = torch.arange(len(found.keys)) + opened.repeat_interleave(seen.flatten())
        tokens = torch.full((int(tiles.sum()) * tile.keys,), keys, dtype=torch.int32)
        tokens[places] = found.keys
        # Keys of a tile from its first one on, and how many of its box no row hides.
        first = torch.arange(int(tiles.sum())) - (ends - tiles).flatten().repeat_interleave(
            tiles.flatten())
        left = seen.flatten().repeat_interleave(tiles.flatten()) - first * tile.keys
        full = found.full.flatten().repeat_interleave(tiles.flatten()) - first * tile.keys
        entries = left.clamp(max=tile.keys) * 2 + (full < tile.keys)
        order = torch.full((found.order.shape[0], tile.rows), -1, dtype=torch.int32)
        order[:, :found.order.shape[1]] = found.order
        return Gathers((starts.int(), entries.int()), tokens, order.flatten(), len(order))
