"""How many scores a mask keeps, exactly, without an N x N tensor at large N.

Masks that keep one run of keys per row (causal, bands, prefixes, windows on a line and what `&`
makes of them) are counted row by row, grids as the product of their axes, `~` and `|` from the
others. Any other mask is cut into tiles: full and empty ones are counted by their areas, and only
the scores of partial tiles are asked one by one, in chunks, up to a limit.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.evaluate import Env, evaluate
from attnopt.ir.expr import Expr
from attnopt.ir.intervals import FULL, PARTIAL, tile_states
from attnopt.ir.mask import Band, Causal, Neighborhood, Prefix, Select, Where, Windows
from attnopt.ir.mask_base import ALL, And, Mask, Not, Or
from attnopt.ir.spec import leading_axes
from attnopt.ir.tiling import GridTile, Tiling, tile_count

#: scores that are asked one by one at most, and at a time
MOST, _CHUNK = 1 << 26, 1 << 20
#: tokens of the tiles that are tried where those of 64 tokens leave too much, and how many may be
_FINE, _STATES = 16, 1 << 21
_SIDE = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}


def known_part(mask: Mask, slots: frozenset[str] | set[str]) -> Mask:
    """The part of a mask that needs no operand but `slots`: it keeps all that the mask keeps."""
    if mask.slots <= slots:
        return mask
    if isinstance(mask, And):
        return functools.reduce(Mask.__and__, (known_part(m, slots) for m in mask.masks))
    if isinstance(mask, Where) and mask.expr.op == "and":
        a, b = (known_part(Where(e), slots) for e in mask.expr.args)
        return a & b
    return ALL


def count(mask: Mask, queries: int, keys: int, leading: Sequence[int] = (),
          operands: Mapping[str, Tensor] | None = None, most: int = MOST) -> int | None:
    """Scores that are kept, of all leading entries together; None where that takes too long.

    leading: lengths of the leading axes in tensor order
    operands: tensors by slot; all that the mask loads must be there
    """
    rows = _Counting(queries, keys, tuple(leading), operands or {})
    found = rows.closed(mask)
    return rows.by_tiles(mask, most) if found is None else found


def density(mask: Mask, queries: int, keys: int, leading: Sequence[int] = (),
            operands: Mapping[str, Tensor] | None = None, most: int = MOST) -> float | None:
    """The share of the scores that is kept; None where counting takes too long."""
    total = math.prod(leading) * queries * keys
    found = count(mask, queries, keys, leading, operands, most) if total else 0
    return None if found is None else found / max(total, 1)


class _Counting:
    def __init__(self, queries: int, keys: int, leading: tuple[int, ...],
                 operands: Mapping[str, Tensor]) -> None:
        self.queries, self.keys, self.leading = queries, keys, leading
        self.operands = operands
        self.entries = math.prod(leading)

    # -- closed forms -----------------------------------------------------------------------------
    def closed(self, mask: Mask) -> int | None:
        """The number by rows and axes, None where the mask is of another kind."""
        if mask == ALL:
            return self.entries * self.queries * self.keys
        if isinstance(mask, Not):
            inner = self.closed(mask.mask)
            return None if inner is None else self.entries * self.queries * self.keys - inner
        if isinstance(mask, Or) and len(mask.masks) == 2:
            a, b = mask.masks
            parts = [self.closed(m) for m in (a, b, a & b)]
            if any(p is None for p in parts):
                return None
            return parts[0] + parts[1] - parts[2]  # type: ignore[operator]
        if isinstance(mask, Select):
            return self._select(mask)
        runs = self._runs(mask)
        if runs is not None:
            return self.entries * int((runs[1] - runs[0]).clamp(min=0).sum())
        return self._grid(mask)

    def _runs(self, mask: Mask) -> tuple[Tensor, Tensor] | None:
        """(first key, key after the last) of every row."""
        if isinstance(mask, And):
            parts = [self._runs(m) for m in mask.masks]
            known = [p for p in parts if p is not None]
            if len(known) < len(parts):
                return None
            return (functools.reduce(torch.maximum, (p[0] for p in known)),
                    functools.reduce(torch.minimum, (p[1] for p in known)))
        row = torch.arange(self.queries)
        low: Any = torch.zeros_like(row)
        high: Any = torch.full_like(row, self.keys)
        if isinstance(mask, Causal):
            ends = self._numbers(mask.offset)
            high = None if ends is None else row + ends + 1
        elif isinstance(mask, Band):
            first, last = self._numbers(mask.lo), self._numbers(mask.hi)
            if first is None or last is None:
                return None
            low, high = row + first, row + last + 1
        elif isinstance(mask, Prefix):
            high = self._numbers(mask.count)
        elif isinstance(mask, Windows) and mask.length == (None,):
            width = self._numbers(mask.window[0])
            if not isinstance(width, int):
                return None
            low = row // width * width
            high = low + width
        elif isinstance(mask, Neighborhood) and len(mask.window) == 1 and mask.dilation == (1,):
            low, high = _window(mask, row, mask.length[0] or self.queries)
        elif mask != ALL:
            return None
        if high is None:
            return None
        return (torch.as_tensor(low).expand_as(row).clamp(0, self.keys),
                torch.as_tensor(high).expand_as(row).clamp(0, self.keys))

    def _numbers(self, e: Expr) -> Any:
        """An int, or one per row; None where it needs more than rows and sizes."""
        if e.slots or e.indices - {"q"}:
            return None
        found = evaluate(e, Env((self.queries, self.keys)))
        return found.flatten().long() if torch.is_tensor(found) else int(found)

    def _grid(self, mask: Mask) -> int | None:
        """A neighbourhood or a partition of a grid: the product of its axes."""
        if (not isinstance(mask, Neighborhood | Windows) or len(mask.length) == 1
                or self.queries != self.keys):
            return None
        inside = math.prod(n for n in mask.length[1:] if n is not None)
        length = [self.queries // inside if n is None else n for n in mask.length]
        if math.prod(length) != self.queries:
            return None
        total = self.entries
        for axis, n in enumerate(length):
            own: Mask
            if isinstance(mask, Windows):
                if mask.window[axis].has("size"):
                    return None
                own = Windows((mask.window[axis],))
            else:
                own = Neighborhood((mask.window[axis],), (mask.stride[axis],),
                                   (mask.dilation[axis],), (mask.causal[axis],), (n,))
            found = count(own, n, n)
            if found is None:
                return None
            total *= found
        return total

    def _select(self, mask: Select) -> int | None:
        """By head or batch entry: one count per case."""
        names = leading_axes(len(self.leading))
        if mask.which.slots or mask.which.indices - set(names):
            return None
        which = evaluate(mask.which, Env((*self.leading, self.queries, self.keys)))
        chosen = torch.as_tensor(which).expand(*self.leading, 1, 1).flatten()
        last, one = len(mask.cases) - 1, _Counting(self.queries, self.keys, (), self.operands)
        total = 0
        for case in range(len(mask.cases)):
            other = chosen == case if case < last else (chosen < 0) | (chosen >= last)
            taken = int(other.sum())
            if taken and mask.cases[case].axes & set(names):
                return None
            found = one.closed(mask.cases[case]) if taken else 0
            if found is None:
                return None
            total += taken * found
        return total

    # -- tiles ------------------------------------------------------------------------------------
    def by_tiles(self, mask: Mask, most: int) -> int | None:
        """Full tiles by their areas, partial ones score by score."""
        grid = counting_boxes(mask, self.queries, self.keys)
        found = self._by_tiles(mask, grid or 64, most)
        small = tile_count(_FINE, self.queries) * tile_count(_FINE, self.keys)
        if found is None and grid is None and small <= _STATES:
            found = self._by_tiles(mask, _FINE, most)  # less of it is partial then
        return found

    def _by_tiles(self, mask: Mask, tiling: Tiling, most: int) -> int | None:
        predicate = mask.predicate()
        states = tile_states(predicate, self.queries, self.keys, tiling, tiling, self.leading,
                             self.operands)
        lead = states.shape[:-2]
        repeated = self.entries // max(math.prod(lead), 1)
        rows, row_there = tokens(tiling, self.queries)
        columns, column_there = tokens(tiling, self.keys)
        areas = row_there.sum(-1)[:, None] * column_there.sum(-1)
        partial = (states == PARTIAL).nonzero()
        if len(partial) * rows.shape[1] * columns.shape[1] > most:
            return None
        total = int(((states == FULL) * areas).sum())
        for place, pairs in _by_entry(partial, len(lead)):
            step = max(1, _CHUNK // (rows.shape[1] * columns.shape[1]))
            for chunk in pairs.split(step):
                kept = self._ask(predicate, place, rows[chunk[:, 0]], columns[chunk[:, 1]])
                there = row_there[chunk[:, 0]][:, :, None] & column_there[chunk[:, 1]][:, None]
                total += int((kept & there).sum())
        return total * repeated

    def _ask(self, predicate: Expr, place: tuple[int, ...], rows: Tensor, columns: Tensor,
             ) -> Tensor:
        """bool (tiles, rows, columns): the predicate at these tokens of one leading entry."""
        names = (*leading_axes(len(self.leading)), "q", "k")
        sizes = dict(zip(names, (*self.leading, self.queries, self.keys), strict=True))
        at = dict(zip(names, (*map(E.const, place), E.load("rows_of_tiles", dtype=E.INT),
                              E.load("columns_of_tiles", dtype=E.INT)), strict=True))

        def local(e: Expr) -> Expr | None:
            if e.op == "index":
                return at[e.value]
            if e.op == "size" and e.value in sizes:
                return E.const(sizes[e.value])
            if e.op == "load" and not e.args and e.value in self.operands:
                shape = self.operands[e.value].shape
                own = names[len(names) - len(shape):]
                return E.load(e.value, *(E.const(0) if n == 1 else at[name]
                                         for name, n in zip(own, shape, strict=True)),
                              dtype=e.dtype)
            return None

        shape = (len(rows), rows.shape[1], columns.shape[1])
        env = Env(shape, {**self.operands, "rows_of_tiles": rows[:, :, None],
                          "columns_of_tiles": columns[:, None]})
        return torch.as_tensor(evaluate(predicate.replace(local), env)).expand(shape).bool()


def _window(mask: Neighborhood, row: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The run of keys of every row of a neighbourhood on a line."""
    (w,), (s,) = mask.window, mask.stride
    step = s - 1 if mask.causal[0] else s // 2
    leader = (row // s * s + step).clamp(max=length - 1)
    if mask.causal[0]:
        return leader - w + 1, row + 1
    start = (leader - w // 2).clamp(0, length - w)
    return start, start + w


def counting_boxes(mask: Mask, queries: int, keys: int) -> GridTile | None:
    """Small boxes of the grid that a mask is about, None for a mask over a line."""
    for node in mask.walk():
        if isinstance(node, Neighborhood | Windows) and len(node.length) > 1 and queries == keys:
            inside = math.prod(n for n in node.length[1:] if n is not None)
            length = tuple(queries // inside if n is None else n for n in node.length)
            if math.prod(length) == queries:
                sides = _SIDE.get(len(length), (2,) * len(length))
                return GridTile(length, tuple(map(min, sides, length)))
    return None


def tokens(tiling: Tiling, count: int) -> tuple[Tensor, Tensor]:
    """int64 and bool (tiles, tokens of a tile): the tokens, and whether they exist."""
    grid = tiling if isinstance(tiling, GridTile) else GridTile((count,), (tiling,))
    place, there = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
    for n, t in zip(grid.length, grid.shape, strict=True):
        own = torch.arange(-(-n // t))[:, None] * t + torch.arange(t)
        place = place[:, None, :, None] * n + own.clamp(max=max(n - 1, 0))[None, :, None]
        there = there[:, None, :, None] & (own < n)[None, :, None]
        place, there = (x.flatten(0, 1).flatten(1) for x in (place, there))
    return place, there


def _by_entry(places: Tensor, rank: int) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Places (n, rank + 2), in order, by their leading entry."""
    for entry, group in itertools.groupby(places.tolist(), lambda p: tuple(p[:rank])):
        yield entry, torch.tensor([p[rank:] for p in group]).view(-1, 2)
