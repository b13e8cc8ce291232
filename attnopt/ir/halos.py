"""Boxes of queries of a grid, and the keys that each of them sees: its halo.

A window on a 2-D or 3-D grid is scattered over the row-major tokens: a run of 56 tokens of a 56 x
56 map sees whole rows of the map, a box of 7 x 8 of them sees 13 x 14 keys with a window of 7. So
the queries are taken in boxes, and the keys of a box are listed one by one (halo tiling, as in
HaloNet, arXiv 2103.12731, and fused neighbourhood attention, arXiv 2403.04690).

Where the mask is a product of masks along the axes of the grid (`Neighborhood`, `Windows`, what is
joined to them by `&`), so is a halo: the work is that of tables along the axes, and of writing the
lists. Any other mask over a grid is asked token by token what each box may see.

A neighbourhood with dilation is a neighbourhood within each group of tokens d apart. Along such an
axis the boxes are cut out of the groups, one after the other.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.ir.axis_tables import axes_of
from attnopt.ir.intervals import EMPTY, FULL, tile_states
from attnopt.ir.mask import Mask, Neighborhood, Windows
from attnopt.ir.mask_base import And
from attnopt.ir.tiling import GridTile

#: scores of an axis that are written out, pairs of box and token that are asked one by one, and
#: keys that lists may hold
LARGEST_AXIS, LARGEST_PAIRS, LARGEST_LISTS = 1 << 22, 1 << 22, 1 << 23


@dataclass(frozen=True)
class Grid:
    """The grid that a mask is about: its lengths for queries and keys.

    axes: per axis the masks that must all hold along it; None where it is no product of axes
    rest: something besides them may hide keys
    dilation: per axis, of the queries
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    axes: tuple[tuple[Mask, ...], ...] | None
    rest: bool
    dilation: tuple[int, ...]


@dataclass(frozen=True)
class Halos:
    """The keys of every box of queries, those that no row of it hides first.

    order:  int32 (boxes, rows): the queries of every box, then -1
    starts: int64 (*L or 1, boxes + 1): box i of a leading entry sees keys[starts[i]:starts[i + 1]]
    full:   int64 (*L or 1, boxes): how many of these no row hides
    keys:   int32 (n,)
    """

    order: Tensor
    starts: Tensor
    full: Tensor
    keys: Tensor


@functools.lru_cache(maxsize=1024)
def grid_of(mask: Mask, queries: int, keys: int) -> Grid | None:
    """The grid of a mask for so many tokens; None where it has none of two axes or of dilation."""
    if not queries or not keys:
        return None
    found = {(n, m): _dilation(node) for node in mask.walk()
             for n, m in [(_lengths(node, queries), _lengths(node, keys))] if n and m}
    if len(found) != 1:
        return None
    (lengths, dilation), = found.items()
    if len(lengths[0]) < 2 and max(dilation) == 1:
        return None
    parts = mask.masks if isinstance(mask, And) else (mask,)
    split = [axes_of(part, queries, keys) for part in parts]
    known = [axes for axes, *_ in filter(None, split)]
    if known:
        return Grid(*lengths, tuple(zip(*known, strict=True)), len(known) < len(parts), dilation)
    return Grid(*lengths, None, bool(mask.slots), dilation)


def _lengths(node: Mask, tokens: int) -> tuple[int, ...]:
    """Grid lengths of a node for so many tokens, () where it has none."""
    if not isinstance(node, Neighborhood | Windows):
        return ()
    inside = math.prod(n for n in node.length[1:] if n is not None)
    lengths = tuple(tokens // inside if n is None else n for n in node.length)
    return lengths if math.prod(lengths) == tokens else ()


def _dilation(node: Mask) -> tuple[int, ...]:
    return node.dilation if isinstance(node, Neighborhood) else (1,) * len(
        getattr(node, "length", ()))


# -- one axis ---------------------------------------------------------------------------------
def axis_order(length: int, dilation: int) -> list[int]:
    """The coordinates of an axis, group by group."""
    return [i for g in range(dilation) for i in range(g, length, dilation)]


@functools.lru_cache(maxsize=4096)
def _axis_table(masks: tuple[Mask, ...], queries: int, keys: int, dilation: int, side: int,
                ) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]] | None:
    """(coordinates that each run of `side` sees, first those that none of it hides; how many of
    these there are). None where the axis is too long for it."""
    if queries * keys > LARGEST_AXIS:
        return None
    kept = functools.reduce(torch.logical_and, (m.to_dense(queries, keys) for m in masks))
    kept = kept[axis_order(queries, dilation)]
    runs = [kept[i:i + side] for i in range(0, queries, side)]
    full = torch.stack([run.all(0) for run in runs]).tolist()
    seen = torch.stack([run.any(0) for run in runs]).tolist()
    table = tuple(
        (*(k for k in range(keys) if f[k]), *(k for k in range(keys) if s[k] and not f[k]))
        for f, s in zip(full, seen, strict=True))
    return table, tuple(map(sum, full))


# -- all boxes --------------------------------------------------------------------------------
@functools.lru_cache(maxsize=4096)
def halo_sizes(mask: Mask, queries: int, keys: int, box: tuple[int, ...],
               leading: tuple[int, ...] = ()) -> tuple[Tensor, Tensor] | None:
    """int64 (*L or 1, boxes): how many keys each box sees, and how many of them no row hides.

    None where the mask has no such grid, or where the lists would be too long.
    """
    grid = grid_of(mask, queries, keys)
    if grid is None or len(box) != len(grid.queries):
        return None
    with torch.inference_mode(False):
        if grid.axes is None:
            states = _states(mask, grid, box, leading)
            if states is None:
                return None
            seen, full = (states != EMPTY).sum(-1), (states == FULL).sum(-1)
        else:
            tables = _tables(grid, box)
            if tables is None:
                return None
            seen, full = (functools.reduce(
                lambda a, b: (a[:, None] * b).flatten(),
                [torch.tensor(n, dtype=torch.int64) for n in counts]).view(
                    *[1] * len(leading), -1)
                for counts in ([list(map(len, t)) for t, _ in tables], [f for _, f in tables]))
        if int(seen.sum()) > LARGEST_LISTS:
            return None
        return seen, torch.zeros_like(full) if grid.rest else full


def halos(mask: Mask, queries: int, keys: int, box: tuple[int, ...],
          leading: tuple[int, ...] = ()) -> Halos | None:
    """The halos of all boxes, None as in `halo_sizes`. Row-major order of the boxes."""
    sizes = halo_sizes(mask, queries, keys, box, leading)
    grid = grid_of(mask, queries, keys)
    if sizes is None or grid is None:
        return None
    seen, full = sizes
    ends = seen.flatten().cumsum(0).view(seen.shape)
    starts = torch.cat([ends - seen, ends[..., -1:]], -1)
    if grid.axes is None:
        states = _states(mask, grid, box, leading)
        assert states is not None
        ordered = torch.sort(states, dim=-1, descending=True, stable=True)
        found = ordered.indices[ordered.values != EMPTY].int()
    else:
        found = _product(grid, box)
    return Halos(_order(grid, box), starts, full, found)


def _tables(grid: Grid, box: tuple[int, ...],
            ) -> list[tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]] | None:
    assert grid.axes is not None
    found = [_axis_table(*entry) for entry in zip(
        grid.axes, grid.queries, grid.keys, grid.dilation, box, strict=True)]
    known = [table for table in found if table is not None]
    return known if len(known) == len(found) else None


def _product(grid: Grid, box: tuple[int, ...]) -> Tensor:
    """The keys of all halos: of each box first those that are full along every axis."""
    tables = _tables(grid, box)
    assert tables is not None
    coordinates: list[Tensor] = []  # (boxes, most keys along the axis)
    counts, wholes = [], []
    for table, full in tables:
        most = max(map(len, table))
        coordinates.append(torch.tensor([[*row, *[0] * (most - len(row))] for row in table],
                                        dtype=torch.int64).view(len(table), most))
        counts.append(torch.tensor(list(map(len, table))))
        wholes.append(torch.tensor(full))
    boxes = torch.cartesian_prod(*[torch.arange(len(c)) for c in counts]).view(-1, len(counts))
    sizes = [c[boxes[:, a]] for a, c in enumerate(counts)]
    total = functools.reduce(torch.mul, sizes)
    own = torch.repeat_interleave(torch.arange(len(boxes)), total)
    rest = torch.arange(len(own)) - (total.cumsum(0) - total)[own]
    token, step = torch.zeros_like(rest), 1
    whole = torch.ones(len(own), dtype=torch.bool)
    for a in reversed(range(len(counts))):
        size = sizes[a][own]
        place, rest = rest % size, rest // size
        axis_box = boxes[own, a]
        token += step * coordinates[a][axis_box, place]
        whole &= place < wholes[a][axis_box]
        step *= grid.keys[a]
    return token[torch.sort(own * 2 + ~whole, stable=True).indices].int()


def _order(grid: Grid, box: tuple[int, ...]) -> Tensor:
    """int32 (boxes, rows of a box), then -1."""
    runs = [[order[i:i + side] for i in range(0, n, side)]
            for n, d, side in zip(grid.queries, grid.dilation, box, strict=True)
            for order in [axis_order(n, d)]]
    steps = [math.prod(grid.queries[a + 1:]) for a in range(len(box))]
    size = math.prod(box)
    rows = []
    for sides in itertools.product(*runs):
        tokens = [sum(c * s for c, s in zip(place, steps, strict=True))
                  for place in itertools.product(*sides)]
        rows.append(tokens + [-1] * (size - len(tokens)))
    return torch.tensor(rows, dtype=torch.int32)


@functools.lru_cache(maxsize=8)
def _states(mask: Mask, grid: Grid, box: tuple[int, ...], leading: tuple[int, ...],
            ) -> Tensor | None:
    """int8 (*L or 1, boxes, keys) by intervals; None where there are too many, or with dilation,
    whose boxes are no runs."""
    counts = math.prod(-(-n // t) for n, t in zip(grid.queries, box, strict=True))
    tokens = math.prod(grid.keys)
    if counts * tokens * math.prod(leading) > LARGEST_PAIRS or max(grid.dilation) > 1:
        return None
    return tile_states(mask.predicate(), math.prod(grid.queries), tokens,
                       GridTile(grid.queries, box), 1, leading, missing=True)


def seen_by_all(mask: Mask, grid: Grid, box: tuple[int, ...]) -> int | None:
    """Keys of all halos together, None as in `halo_sizes`: a product of sums along the axes."""
    if grid.axes is None:
        sizes = halo_sizes(mask, math.prod(grid.queries), math.prod(grid.keys), box)
        return None if sizes is None else int(sizes[0].sum())
    tables = _tables(grid, box)
    if tables is None:
        return None
    total = math.prod(sum(map(len, table)) for table, _ in tables)
    return total if total <= LARGEST_LISTS else None


# -- which boxes ------------------------------------------------------------------------------
def boxes_of(grid: Grid, most: int, fewest: int = 12) -> Sequence[tuple[int, ...]]:
    """Boxes of `fewest` to `most` queries that waste few of their rows at the ends of the axes;
    nearly cubes first."""
    sides = [[t for t in range(1, min(n, most) + 1) if -(-n // t) * t <= 1.1 * n]
             for n in grid.queries]
    found = [box for box in itertools.product(*sides) if fewest <= math.prod(box) <= most]
    return sorted(found, key=lambda box: (max(box) / min(box), box))
