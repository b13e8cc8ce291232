"""Tile states of masks that are a product of masks along the axes of a grid.

A neighbourhood or a partition of a grid keeps a pair of tokens where it keeps their coordinates
along every axis. Cut into boxes, a pair of boxes is EMPTY where it is along one axis, FULL where it
is along all of them and PARTIAL otherwise, so that tables along the axes say it all: O(sum of the
axes) for the tables, O(tiles) for all pairs of boxes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attnopt.ir.intervals import tile_states
from attnopt.ir.mask import Mask, Neighborhood, Windows
from attnopt.ir.mask_base import And
from attnopt.ir.tiling import GridTile, Tiling


def mask_states(mask: Mask, queries: int, keys: int, tile_q: Tiling, tile_k: Tiling,
                leading: Sequence[int] = (), operands: Mapping[str, Tensor] | None = None,
                *, missing: bool = False) -> Tensor:
    """`tile_states` of a mask: by tables along the axes where it is a product of them."""
    axes = axis_states(mask, queries, keys, tile_q, tile_k)
    if axes is None:
        return tile_states(mask.predicate(), queries, keys, tile_q, tile_k, leading, operands,
                           missing=missing)
    found = functools.reduce(_joined, axes)
    return found.view(*[1] * len(leading), *found.shape)


def _joined(outer: Tensor, inner: Tensor) -> Tensor:
    """States of the boxes of two axes; EMPTY < PARTIAL < FULL, so that the least one is `and`."""
    pairs = torch.minimum(outer[:, None, :, None], inner[None, :, None, :])
    return pairs.flatten(2).flatten(0, 1)


def axis_states(mask: Mask, queries: int, keys: int, tile_q: Tiling, tile_k: Tiling,
                ) -> list[Tensor] | None:
    """Per grid axis int8 (query tiles, key tiles); None where the mask is no product of axes.

    A pair of boxes is EMPTY where one axis is, FULL where all are, PARTIAL otherwise.
    """
    if not isinstance(tile_q, GridTile) or not isinstance(tile_k, GridTile):
        return None
    parts = mask.masks if isinstance(mask, And) else (mask,)
    grids = [axes_of(part, queries, keys) for part in parts]
    known = [grid for grid in grids if grid is not None]
    lengths = (tile_q.length, tile_k.length)
    if len(known) != len(grids) or any(grid[1:] != lengths for grid in known):
        return None
    found: list[Tensor] = []
    for axis, (n, m) in enumerate(zip(*lengths, strict=True)):
        states = [tile_states(grid[0][axis].predicate(), n, m, tile_q.shape[axis],
                              tile_k.shape[axis]) for grid in known]
        found.append(functools.reduce(torch.minimum, states))  # EMPTY < PARTIAL < FULL: `and`
    return found


def axes_of(mask: Mask, queries: int, keys: int,
            ) -> tuple[list[Mask], tuple[int, ...], tuple[int, ...]] | None:
    """(masks along each axis, lengths of the queries' grid, of the keys')."""
    if not isinstance(mask, Neighborhood | Windows):
        return None
    inside = math.prod(n for n in mask.length[1:] if n is not None)
    own = [tuple(tokens // inside if n is None else n for n in mask.length)
           for tokens in (queries, keys)]
    if isinstance(mask, Windows):
        if any(w.has("size") for w in mask.window):
            return None
        return [Windows((w,)) for w in mask.window], own[0], own[1]
    axes: list[Mask] = [
        Neighborhood((w,), (s,), (d,), (c,), (n,)) for w, s, d, c, n in zip(
            mask.window, mask.stride, mask.dilation, mask.causal, own[0], strict=True)]
    return axes, own[0], own[1]
