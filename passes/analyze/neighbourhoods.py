"""Neighbourhoods and partitions of a row-major grid, read off the truth values of a mask.

A mask of N x N tokens is one of a grid L_1 x … x L_n = N where every row is the product of what it
keeps along each axis: M == AND_a M_a, with M_a = any of M over the other axes. The lengths are
found among the factorisations of N. Each M_a is then read by itself:

    window    of Generalized Neighborhood Attention (arXiv 2504.16922): always `window` keys of the
              query's dilation group, pushed inward at the ends, shared by `stride` queries; or
              causal, from the window's start up to the query
    band      lo <= j - i <= hi, cut off at the ends (in steps of `step`)
    blocks    of equal width

The window's start is clip(leader - w // 2, 0, L_g - w), so that an even window has one more key on
its left; the leader of an even stride is the member right of the centre. What is returned has been
compared with the whole mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.mask import Mask, Neighborhood, Where, Windows
from attnopt.ir.mask_grid import coordinates
from attnopt.passes.analyze.tables import Runs, Table, runs_of

#: Grids have at most so many axes.
DIMS = 3


@dataclass(frozen=True)
class Window:
    """A window of GNA along one axis."""

    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False


@dataclass(frozen=True)
class Cut:
    """lo <= j - i <= hi with j - i a multiple of `step`, cut off at the ends of the axis."""

    lo: int
    hi: int
    step: int = 1

    def predicate(self, i: Expr, j: Expr) -> Expr:
        kept = (i + self.lo <= j) & (j <= i + self.hi)
        return kept if self.step == 1 else kept & (j % self.step).eq(i % self.step)

    def text(self) -> str:
        if self.lo == -self.hi:
            return str(2 * (self.hi // self.step) + 1)
        return f"[{self.lo}, {self.hi}]"


# -- one axis -------------------------------------------------------------------------------------
def window_of(runs: Runs) -> Window | None:
    """The window of GNA that gives these runs; the smallest stride where several do."""
    length, d = len(runs.first), runs.step
    at = torch.arange(length)
    count, group = runs.count, at % d
    if not torch.equal(runs.first % d, group):
        return None
    causal = torch.equal(runs.last, at) and int(count.max()) > 1
    window = int(count[-1]) if causal else int(count[0])
    if window * d > length or not causal and not bool((count == window).all()):
        return None
    p, start = at // d, runs.first // d
    last = (length - group + d - 1) // d - 1
    for stride in range(1, window + 1):
        leader = torch.minimum(p // stride * stride + (stride - 1 if causal else stride // 2), last)
        if causal:
            wanted = (leader - window + 1).clamp(min=0)
        else:
            wanted = torch.minimum((leader - window // 2).clamp(min=0), last - window + 1)
        if torch.equal(start, wanted):
            return Window(window, stride, d, causal)
    return None


def cut_of(runs: Runs, keys: int) -> Cut | None:
    """The band, cut off at the ends, that gives these runs over so many keys."""
    d = runs.step
    at = torch.arange(len(runs.first))
    lo, hi = int((runs.first - at).min()), int((runs.last - at).max())
    if lo % d or hi % d:
        return None
    first = torch.maximum(at + lo, at % d)
    last = torch.minimum(at + hi, keys - 1 - (keys - 1 - at) % d)
    return Cut(lo, hi, d) if torch.equal(first, runs.first) and torch.equal(
        last, runs.last) else None


def width_of(runs: Runs) -> int | None:
    """The width of equal blocks that give these runs, the last one maybe shorter."""
    length, width = len(runs.first), int(runs.last[0]) + 1
    at = torch.arange(length)
    first = at // width * width
    same = torch.equal(runs.first, first) and torch.equal(
        runs.last, (first + width - 1).clamp(max=length - 1))
    return width if same and runs.step == 1 else None


# -- grids ----------------------------------------------------------------------------------------
def grids(tokens: int, dims: int) -> list[tuple[int, ...]]:
    """Lengths of at least 2 whose product is `tokens`, those most alike first."""
    def split(rest: int, axes: int) -> Iterator[tuple[int, ...]]:
        if axes == 1:
            yield (rest,)
            return
        for n in range(2, rest // 2 ** (axes - 1) + 1):
            if rest % n == 0:
                for inner in split(rest // n, axes - 1):
                    yield (n, *inner)
    return sorted(split(tokens, dims), key=lambda lengths: (sum(lengths), lengths))


@dataclass(frozen=True)
class GridMask:
    """A mask with the words for it."""

    mask: Mask
    text: str


def read_grid(table: Table, dims: Sequence[int] = range(1, DIMS + 1)) -> GridMask | None:
    """The neighbourhood or partition that a square table is; None where it is none.

    Where an axis is kept whole a grid of fewer axes with a stride says the same; the reading with
    fewest strides is taken, then that with fewest axes.
    """
    if table.queries != table.keys or table.queries < 2:
        return None
    probes = torch.tensor(sorted({0, table.queries // 2, table.queries // 3, table.queries - 1}))
    rows = table.take(probes)
    best: GridMask | None = None
    for axes in dims:
        for lengths in grids(table.queries, axes):
            if axes > 1 and not _is_box(rows, lengths):
                continue
            found = _on_grid(table, lengths)
            if found is not None and (best is None or _strides(found.mask) < _strides(best.mask)):
                best = found
            if best is not None and not _strides(best.mask):
                return best
    return best


def _strides(mask: Mask) -> int:
    """Axes whose windows are shared by several queries."""
    return sum(s > 1 for s in mask.stride) if isinstance(mask, Neighborhood) else 0


def _projections(rows: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """What each row keeps along each axis."""
    grid = rows.view(len(rows), *lengths)
    return [grid.any(dim=[1 + b for b in range(len(lengths)) if b != a]) if len(lengths) > 1
            else grid for a in range(len(lengths))]


def _is_box(rows: Tensor, lengths: Sequence[int]) -> bool:
    """Is every row the product of its projections?"""
    box = torch.ones(len(rows), *[1] * len(lengths), dtype=torch.bool)
    for a, along in enumerate(_projections(rows, lengths)):
        box = box & along.view(len(rows), *(n if a == b else 1 for b, n in enumerate(lengths)))
    return torch.equal(box.reshape(rows.shape), rows)


def _axis_table(table: Table, lengths: Sequence[int], axis: int) -> Table:
    """M_a, from the queries that differ from the middle of the grid along this axis only."""
    if len(lengths) == 1:
        return table
    inside = math.prod(lengths[axis + 1 :])
    middle = sum(n // 2 * math.prod(lengths[b + 1 :])
                 for b, n in enumerate(lengths) if b != axis)

    def take(places: Tensor) -> Tensor:
        return _projections(table.take(middle + places * inside), lengths)[axis]
    return Table(lengths[axis], lengths[axis], take)


def _on_grid(table: Table, lengths: tuple[int, ...]) -> GridMask | None:
    runs = []
    for axis in range(len(lengths)):
        own = runs_of(_axis_table(table, lengths, axis))
        if own is None:
            return None
        runs.append(own)
    for found in filter(None, (_windows(runs, lengths), _neighborhood(runs, lengths),
                               _cropped(runs, lengths))):
        if table.equals(found.mask):
            return found
    return None


def _of(lengths: Sequence[int]) -> str:
    return f" of {'x'.join(map(str, lengths))}" if len(lengths) > 1 else ""


def _windows(runs: Sequence[Runs], lengths: tuple[int, ...]) -> GridMask | None:
    widths = [width_of(r) for r in runs]
    if None in widths:
        return None
    mask = Windows(tuple(E.const(w) for w in widths if w is not None), _lengths(lengths))
    return GridMask(mask, mask.describe() + _of(lengths))


def _lengths(lengths: tuple[int, ...]) -> tuple[int | None, ...]:
    return lengths if len(lengths) > 1 else (None,)


def _neighborhood(runs: Sequence[Runs], lengths: tuple[int, ...]) -> GridMask | None:
    axes = [window_of(r) for r in runs]
    if None in axes:
        return None
    along = [a for a in axes if a is not None]
    mask = Neighborhood(
        tuple(a.window for a in along), tuple(a.stride for a in along),
        tuple(a.dilation for a in along), tuple(a.causal for a in along), lengths)
    return GridMask(mask, mask.describe() + _of(lengths))


def _cropped(runs: Sequence[Runs], lengths: tuple[int, ...]) -> GridMask | None:
    axes = [cut_of(r, n) for r, n in zip(runs, lengths, strict=True)]
    if None in axes:
        return None
    along = [a for a in axes if a is not None]
    kept = E.TRUE
    pairs = zip(coordinates(E.index("q"), lengths), coordinates(E.index("k"), lengths),
                lengths, along, strict=True)
    for (i, _), (j, _), n, axis in pairs:
        if axis.step > 1 or min(-axis.lo, axis.hi) < n - 1:
            kept = kept & axis.predicate(i, j)
    text = "x".join(str(n) if min(-a.lo, a.hi) >= n - 1 else a.text()
                    for n, a in zip(lengths, along, strict=True))
    if any(a.step > 1 for a in along):
        text += f" dilation {'x'.join(str(a.step) for a in along)}"
    return GridMask(Where(kept), f"window {text}{_of(lengths)}, cut off at the borders") \
        if kept is not E.TRUE else None
