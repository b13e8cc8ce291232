"""Boxes of a grid as tiles: a neighbourhood is dense in few boxes, but in no run of tokens.

Tokens stay where they are: a box is an index map from its places to tokens, or a block of a tensor
descriptor with an axis for each axis of the grid. Which boxes are best follows from the tile
counter (`attnopt.cost.tiles`). A neighbourhood is the product of its axes, and so are the numbers
of tiles that it visits and of those that it fills:

    cost = visited * (1 + m) - full * m        m: what a mask adds to the work of a tile

where each number is a product of one factor per axis, so that all shapes are compared in the time
of a few counts along single axes.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import Tensor

from attnopt.cost.gpu import Kernel as Rates
from attnopt.cost.tiles import count_tiles
from attnopt.ir.axis_tables import axis_states
from attnopt.ir.intervals import EMPTY, FULL
from attnopt.ir.mask import And, Mask, Neighborhood, Not, Or, Select, Windows
from attnopt.ir.tiling import GridTile, tilings_of

#: axes of a grid that the kernels have text for
MOST_AXES = 3
#: pairs of tiles up to which runs of tokens are counted, too; longer grids are far from small
_COUNTED = 1 << 18
#: boxes must save at least this share of the work of runs
_MARGIN = 0.05

Boxes = tuple[GridTile, GridTile]


def part_on_grid(mask: Mask) -> Mask | None:
    """The first neighbourhood or partition of a grid of several axes that is over all tokens."""
    if isinstance(mask, Neighborhood | Windows):
        return mask if 2 <= len(mask.length) <= MOST_AXES else None
    if isinstance(mask, And | Or | Not | Select):
        return next((m for m in map(part_on_grid, mask.children()) if m is not None), None)
    return None


@functools.lru_cache(maxsize=256)
def boxes_of(mask: Mask, queries: int, keys: int, rows: int, columns: int) -> Boxes | None:
    """The boxes of `rows` queries and `columns` keys in which the mask costs least.

    None where there is no grid of these lengths, or runs of tokens cost as little.
    """
    part = part_on_grid(mask)
    if not isinstance(part, Neighborhood | Windows):
        return None
    inside = math.prod(n for n in part.length[1:] if n is not None)
    first = [tokens // max(inside, 1) for tokens in (queries, keys)]
    if any(n * inside != tokens or not tokens
           for n, tokens in zip(first, (queries, keys), strict=True)):
        return None
    if part.length[0] is not None and any(n != part.length[0] for n in first):
        return None
    lengths = [(n, *(m for m in part.length[1:] if m is not None)) for n in first]
    found = _cheapest(part, queries, keys, lengths, rows, columns)
    if found is None:
        return None
    cost, boxes = found
    if math.ceil(queries / rows) * math.ceil(keys / columns) <= _COUNTED:
        counts = count_tiles(part, queries, keys, rows, columns, tail=True)
        runs = int(counts.full.sum()) + int(counts.partial.sum()) * (1 + Rates.masked)
        if cost > runs * (1 - _MARGIN):
            return None
    return boxes


def _cheapest(part: Mask, queries: int, keys: int, lengths: list[tuple[int, ...]], rows: int,
              columns: int) -> tuple[float, Boxes] | None:
    """(cost, boxes) of the best shapes."""
    shapes = [[t.shape for t in tilings_of(own, size)]
              for own, size in zip(lengths, (rows, columns), strict=True)]
    sides = [sorted({side for shape in kind for side in shape}) for kind in shapes]
    counts = {pair: _counts(part, queries, keys, *lengths, *pair)
              for pair in itertools.product(*sides)}
    if None in counts.values():
        return None
    best: tuple[float, int, Boxes] | None = None
    for own, other in itertools.product(*shapes):
        # of each axis, (visited, full)
        factors = [(counts[pair] or ())[axis]
                   for axis, pair in enumerate(zip(own, other, strict=True))]
        seen, whole = (math.prod(column) for column in zip(*factors, strict=True))
        # Of boxes that cost the same, those with the longest runs of tokens load best.
        found = (seen * (1 + Rates.masked) - whole * Rates.masked, -own[-1] - other[-1],
                 (GridTile(lengths[0], own), GridTile(lengths[1], other)))
        if best is None or found[:2] < best[:2]:
            best = found
    return None if best is None else (best[0], best[2])


@functools.lru_cache(maxsize=1024)
def _counts(part: Mask, queries: int, keys: int, rows: tuple[int, ...], columns: tuple[int, ...],
            side: int, other: int) -> tuple[tuple[float, float], ...] | None:
    """(visited, full) pairs of tiles along every axis, with the same sides along all of them."""
    rank = len(rows)
    states = axis_states(part, queries, keys, GridTile(rows, (side,) * rank),
                         GridTile(columns, (other,) * rank))
    if states is None:
        return None
    return tuple((float((state != EMPTY).sum()),
                  float(((state == FULL) & ~_cut(other, n)).sum()))
                 for state, n in zip(states, columns, strict=True))


def _cut(side: int, length: int) -> Tensor:
    """bool (tiles,): those that the end of an axis cuts off."""
    return torch.arange(1, -(-length // side) + 1) * side > length


def constants(boxes: Boxes) -> dict[str, int]:
    """What is constant in the text of kernels whose tiles are boxes, by name.

    N1, N2: lengths of the grid but the first; QB0 …, KB0 …: sides of a box of queries and of keys;
    QC1 …, KC1 …: boxes along an axis
    """
    found = {f"N{a}": n for a, n in enumerate(boxes[0].length) if a}
    for letter, box in zip("QK", boxes, strict=True):
        found |= {f"{letter}B{a}": side for a, side in enumerate(box.shape)}
        found |= {f"{letter}C{a}": count for a, count in enumerate(box.counts) if a}
    return found


def names(rank: int) -> tuple[str, ...]:
    """The names in `constants` of boxes with so many axes."""
    if not rank:
        return ()
    one = GridTile((1,) * rank, (1,) * rank)
    return tuple(constants((one, one)))


def functions(rank: int) -> str:
    """The text of the index map: a box's corner from its number, its tokens from its corner."""
    if not rank:
        return ""
    later = range(rank - 1, 0, -1)
    corners = ", ".join(f"at{a}" for a in range(rank))
    counts, sides, lengths = (", ".join(f"{x}{a}: tl.constexpr" for a in range(start, rank))
                              for x, start in (("C", 1), ("B", 0), ("N", 1)))
    inner = ", ".join(f"B{a}: tl.constexpr" for a in range(1, rank))
    corner = [f"    at{a} = number % C{a} * B{a}\n    number = number // C{a}" for a in later]
    place = [f"    at{a} = at{a} + place % B{a}\n    place = place // B{a}" for a in later]
    token = "at0 + place"
    for a in range(1, rank):
        token = f"({token}) * N{a} + at{a}"
    inside = " & ".join([f"(at{a} < N{a})" for a in range(1, rank)] + ["(token < size)"])
    return _TEXT.format(corners=corners, counts=counts, sides=sides, lengths=lengths, inner=inner,
                        corner="\n".join(corner), place="\n".join(place), token=token,
                        inside=inside)


_TEXT = '''
@triton.jit
def box_corner(number, {counts}, {sides}):
    """The first coordinates of a box."""
{corner}
    at0 = number * B0
    return {corners}


@triton.jit
def box_tokens({corners}, size, {lengths}, {inner}, ROWS: tl.constexpr):
    """(ROWS,): the tokens of a box in row-major order, `size` for places beyond the grid."""
    place = tl.arange(0, ROWS)
{place}
    token = {token}
    return tl.where({inside}, token, size)


@triton.jit
def load_tokens(at, tokens, stride, channel_stride, size, WHOLE: tl.constexpr, WIDTH: tl.constexpr,
                PADDED: tl.constexpr):
    """(ROWS, PADDED): the rows of `tokens`; 0 beyond WIDTH channels and, unless WHOLE, `size`."""
    row = tokens[:, None]
    channel = tl.arange(0, PADDED)[None, :]
    place = at + tl.cast(row, tl.int64) * stride + channel * channel_stride
    if WHOLE and WIDTH == PADDED:
        tile = tl.load(place)
    elif WHOLE:
        tile = tl.load(place, mask=channel < WIDTH, other=0.0)
    elif WIDTH == PADDED:
        tile = tl.load(place, mask=row < size, other=0.0)
    else:
        tile = tl.load(place, mask=(row < size) & (channel < WIDTH), other=0.0)
    return tile
'''
