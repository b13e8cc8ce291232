"""The structure of a neighbour table: which mask do the keys j(n, t) of every query n make?

A table that lists each key of a row at most once is a set of keys per row. On the right grids such
a set is a box: along every axis a run of keys that depends on one coordinate of the query only
(`attnopt.passes.analyze.runs`). Every row of the table is compared, so that a mask that is found is
the table, key by key.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.mask import ALL, Band, Causal, Mask, Neighborhood, Where, Windows
from attnopt.ir.mask_base import K, Q
from attnopt.ir.mask_grid import coordinates
from attnopt.passes.analyze.runs import Grid, Run, run_of, span, tiles
from attnopt.rules import Decline

_MOST_GRIDS = 400


@dataclass(frozen=True)
class Structure:
    """What a table is. `rows` and `keys` are the grids of queries and keys; `source[a]` is the
    query axis that the run of key axis a depends on, or None."""

    rows: Grid
    keys: Grid
    runs: tuple[Run, ...]
    source: tuple[int | None, ...]

    def coordinates(self) -> list[tuple[Expr | None, Expr, Run]]:
        """(query coordinate, key coordinate, run) along every key axis."""
        q = [c for c, _ in coordinates(Q, self.rows)]
        k = [c for c, _ in coordinates(K, self.keys)]
        return [(None if s is None else q[s], j, run)
                for s, j, run in zip(self.source, k, self.runs, strict=True)]

    def count(self) -> Expr:
        """How many keys a query has."""
        total = E.const(1)
        for i, _, run in self.coordinates():
            total = total * run.count(i if i is not None else E.const(0))
        return total

    def mask(self) -> Mask:
        """The mask of the ir that keeps exactly these keys."""
        if all(run.family == "all" for run in self.runs):
            return ALL
        same = self.rows == self.keys and all(
            s is None or s == a for a, s in enumerate(self.source))
        if same and all(tiles(run) for run in self.runs):
            return Windows(tuple(E.const(r.length if r.family == "all" else r.block)
                                 for r in self.runs), self.keys)
        if same and all(run.family in ("all", "inward") for run in self.runs):
            full = [run.family == "all" for run in self.runs]
            pairs = list(zip(self.runs, full, strict=True))
            return Neighborhood(
                tuple(r.length if f else r.window for r, f in pairs),
                tuple(1 if f else r.step for r, f in pairs),
                tuple(1 if f else r.gap for r, f in pairs),
                tuple(False if f else r.causal for r, f in pairs), self.keys)
        if same and len(self.runs) == 1:
            run = self.runs[0]
            if run.family == "clipped" and run.block == run.step == run.gap == 1:
                if run.low is None and run.high == 0:
                    return Causal()
                low, high = run.low, run.high
                return Band(E.const(-run.length if low is None else low),
                            E.const(run.length if high is None else high))
        keep = E.TRUE
        for i, j, run in self.coordinates():
            keep = keep & run.keeps(i if i is not None else E.const(0), j)
        return Where(keep)

    def describe(self) -> str:
        """The structure in a few words."""
        spans = [run for run in self.runs if run.family != "all"]
        if not spans:
            return "every key"
        text = "x".join(str(span(run)) for run in self.runs)
        clipped = any(run.family == "clipped" for run in spans)
        if clipped and all(tiles(r) or r.family == "all" for r in spans):
            return f"partition {text}"
        words = f"window {text}"
        if clipped and any(r.block > 1 and r.block == r.step for r in spans):
            blocks = "x".join(str(r.length if r.family == "all" else r.block) for r in self.runs)
            words = f"window {text} of blocks {blocks}"
        steps = "x".join(str(r.step) for r in self.runs)
        if any(r.step > 1 and (r.family == "inward" or r.block == 1) for r in spans):
            words += f" stride {steps}"
        if any(r.gap > 1 for r in spans):
            words += " dilation " + "x".join(str(r.gap) for r in self.runs)
        if any(r.causal for r in spans):
            words += " causal"
        return words + (" cropped at the borders" if clipped else "")


def structure(table: Tensor, visible: Tensor, rows: Sequence[Grid],
              keys: Sequence[Grid]) -> Structure:
    """The structure of `table` (N, T) where `visible`; raises Decline where none is found.

    rows, keys: grids of queries and keys to try first, the likeliest at the front
    """
    if not bool(visible.any(1).all()):
        raise Decline("a query has no neighbour")
    ordered = torch.where(visible, table, -1).sort(1).values
    if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
        raise Decline("a key occurs more than once among the neighbours of a query")
    count = visible.sum(1)
    tried = 0
    for grid in _grids(keys):
        boxes = _boxes(table, visible, count, grid)
        if boxes is None:
            continue
        for own in _grids([*(g for g in rows), *([grid] if math.prod(grid) == len(table) else [])]):
            tried += 1
            found = _runs(boxes, own, grid)
            if found is not None:
                return Structure(own, grid, tuple(r for r, _ in found), tuple(s for _, s in found))
            if tried > _MOST_GRIDS:
                break
    raise Decline("the neighbour table is no window, block or band on any grid that fits it")


def _grids(given: Sequence[Grid]) -> Iterator[Grid]:
    """The given grids, and factorisations in two and three axes of those with one."""
    seen: set[Grid] = set()
    flat = [g for g in given if len(g) == 1]
    more: list[Grid] = []
    for (n,) in flat[:1]:
        divisors = [d for d in range(2, n) if n % d == 0]
        more += sorted(((n // d, d) for d in divisors), key=lambda g: abs(g[0] - g[1]))
        more += sorted(((n // d, d // e, e) for d in divisors for e in divisors
                        if e < d and d % e == 0), key=lambda g: max(g) - min(g))
    for grid in itertools.islice(itertools.chain(given, more), _MOST_GRIDS):
        if grid not in seen:
            seen.add(grid)
            yield grid


def _boxes(table: Tensor, visible: Tensor, count: Tensor,
           grid: Grid) -> list[tuple[Tensor, Tensor, int]] | None:
    """(first, last, gap) along every axis if each row is a box of `grid`, else None."""
    few = torch.linspace(0, len(table) - 1, min(len(table), 5)).long()
    for rows in ((few, torch.arange(len(table))) if len(table) > 16 else (torch.arange(
            len(table)),)):
        found, inner = [], math.prod(grid)
        volume = torch.ones_like(rows)
        seen, kept = table[rows], visible[rows]
        for n in grid:
            inner //= n
            place = seen // inner % n
            first = torch.where(kept, place, n).amin(1)
            last = torch.where(kept, place, -1).amax(1)
            met = torch.zeros(n + 1, dtype=torch.bool)
            met[torch.where(kept, place - first[:, None], 0)] = True
            gap = math.gcd(*met.nonzero()[:, 0].tolist()) or 1
            found.append((first, last, gap))
            volume = volume * ((last - first) // gap + 1)
        if not torch.equal(volume, count[rows]):
            return None
    return found


def _runs(boxes: list[tuple[Tensor, Tensor, int]], rows: Grid,
          keys: Grid) -> list[tuple[Run, int | None]] | None:
    """The runs along all axes, of one family where that is possible."""
    first_found: list[tuple[Run, int | None]] = []
    for prefer in (False, True):
        found = []
        for a, ((first, last, gap), n) in enumerate(zip(boxes, keys, strict=True)):
            run = run_of(first, last, gap, rows, n, a, prefer)
            if run is None:
                return None
            found.append(run)
        families = {run.family for run, _ in found if run.family != "all"}
        if len(families) <= 1:
            return found
        first_found = first_found or found
    return first_found
