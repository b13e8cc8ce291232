"""Runs of keys along one axis: which keys first, first + d, ..., last has every query coordinate i?

    clipped   first = s*(i // b) + low and last = s*(i // b) + high, cropped to the axis: windows
              that end at the borders (b = s = 1), blocks with their neighbours (s = b), windows of
              a strided axis of queries (b = 1)
    inward    the windows of Generalized Neighborhood Attention (arXiv 2504.16922): always w keys,
              pushed inward at the borders, with a stride, a dilation and a causal form
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr

Grid = tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """Keys first, first + gap, ..., last along an axis, for every query coordinate i.

    family: "all", "clipped" (`block`, `step`, `low`, `high`; None where a bound never binds) or
            "inward" (`window`, `step` as stride, `causal`)
    """

    family: str
    length: int
    gap: int = 1
    block: int = 1
    step: int = 1
    low: int | None = None
    high: int | None = None
    window: int = 0
    causal: bool = False

    def start(self, i: Expr) -> Expr:
        """Where the run of coordinate `i` starts, before it is cropped."""
        if self.family == "all":
            return E.const(0)
        if self.family == "inward":
            return self._inward(i)
        center = i // self.block * self.step
        if self.low is not None:
            return center + self.low
        return center if self.high is None else center + self.high

    def _inward(self, i: Expr) -> Expr:
        d, s, w = self.gap, self.step, self.window
        last = (self.length - 1 - i % d) // d
        leader = i // d
        if s > 1:
            leader = E.call("minimum", leader // s * s + (s - 1 if self.causal else s // 2), last)
        if self.causal:
            begin = E.call("maximum", leader - (w - 1), 0)
        else:
            begin = E.call("minimum", E.call("maximum", leader - w // 2, 0), last - (w - 1))
        return begin * d + i % d

    def count(self, i: Expr) -> Expr:
        """How many keys the run of coordinate `i` has."""
        if self.family == "all":
            return E.const(self.length)
        if self.family == "inward":
            if not self.causal:
                return E.const(self.window)
            return (i - self._inward(i)) // self.gap + 1
        center, d, end = i // self.block * self.step, self.gap, self.length - 1
        first, last = E.const(0), E.const(end)
        if self.low is not None:
            u = center + self.low
            first = E.call("maximum", u, 0) if d == 1 else E.where(u < 0, u % d, u)
        if self.high is not None:
            v = center + self.high
            last = E.call("minimum", v, end) if d == 1 else E.where(
                v > end, v - (v - end + (d - 1)) // d * d, v)
        return (last - first) // d + 1

    def keeps(self, i: Expr, j: Expr) -> Expr:
        """Is key coordinate `j` in the run of coordinate `i`?"""
        if self.family == "all":
            return E.TRUE
        if self.family == "inward":
            begin = self._inward(i)
            inside = (begin <= j) & (j < begin + self.count(i) * self.gap)
            return inside & ((j - i) % self.gap).eq(0)
        center, inside = i // self.block * self.step, E.TRUE
        if self.low is not None:
            inside = inside & (center + self.low <= j)
        if self.high is not None:
            inside = inside & (j <= center + self.high)
        if self.gap > 1:
            inside = inside & ((j - self.start(i)) % self.gap).eq(0)
        return inside


def tiles(run: Run) -> bool:
    return run.family == "all" or (run.family == "clipped" and run.gap == 1 and run.block > 1
                                   and run.block == run.step and run.low == 0
                                   and run.high == run.block - 1)


def span(run: Run) -> int:
    if run.family == "all":
        return run.length
    if run.family == "inward":
        return run.window
    if run.low is None or run.high is None:
        return run.length
    return (run.high - run.low) // run.gap + 1


def run_of(first: Tensor, last: Tensor, gap: int, rows: Grid, length: int, axis: int,
            prefer_inward: bool = False) -> tuple[Run, int | None] | None:
    """The run that `first` and `last` are, and the query axis that it depends on."""
    if gap == 1 and bool((first == 0).all() & (last == length - 1).all()):
        return Run("all", length), None
    a, b = first.view(rows), last.view(rows)
    for s in sorted(range(len(rows)), key=lambda s: abs(s - axis)):
        others = [d for d in range(len(rows)) if d != s]
        line = [x.movedim(s, 0).reshape(rows[s], -1) for x in (a, b)]
        if others and not all(bool((x == x[:, :1]).all()) for x in line):
            continue
        lo, hi = line[0][:, 0].tolist(), line[1][:, 0].tolist()
        found = _clipped(lo, hi, gap, length)
        inward = _inward(lo, hi, gap, length) if rows[s] == length else None
        if inward is not None and (found is None or not tiles(found)):
            found = inward if found is None or prefer_inward or _cropless(lo, hi) else found
        if found is not None:
            return found, s
    return None


def _cropless(lo: list[int], hi: list[int]) -> bool:
    """Has every run the same number of keys?"""
    return len({b - a for a, b in zip(lo, hi, strict=True)}) == 1


def _clipped(lo: list[int], hi: list[int], gap: int, length: int) -> Run | None:
    for block in _blocks(lo, hi):
        for step in _steps(lo, hi, block, gap, length):
            free = {a - step * (i // block) for i, a in enumerate(lo) if a >= gap}
            low = min(free) if len(free) == 1 else None
            bound = {b - step * (i // block) for i, b in enumerate(hi) if b < length - gap}
            high = min(bound) if len(bound) == 1 else None
            if len(free) > 1 or len(bound) > 1:
                continue
            lows, highs = [low], [high]
            width = max(b - a for a, b in zip(lo, hi, strict=True))
            spans = range(width, length + width + 1, gap) if gap > 1 else (width,)
            if low is None and high is not None:
                lows = [high - span for span in spans] + [None] * (gap == 1)
            elif high is None and low is not None:
                highs = [low + span for span in spans] + [None] * (gap == 1)
            for u, v in itertools.product(lows, highs):
                run = Run("clipped", length, gap, block, step, u, v)
                if (gap == 1 or u is not None) and _fits(run, lo, hi):
                    return run
    return None


def _blocks(lo: list[int], hi: list[int]) -> list[int]:
    """Numbers of neighbouring queries that may share a run."""
    pairs = list(zip(lo, hi, strict=True))
    lengths = [len(list(g)) for _, g in itertools.groupby(pairs)]
    return sorted({1, *lengths})[:8]


def _steps(lo: list[int], hi: list[int], block: int, gap: int, length: int) -> list[int]:
    """By how much the run may move from one block of queries to the next."""
    found = {1, block, -(-length // len(lo)) * block, length // len(lo) * block} - {0}
    for values, free in ((lo, lambda x: x >= gap), (hi, lambda x: x < length - gap)):
        at = [x for x in values[::block]]
        found |= {b - a for a, b in itertools.pairwise(at) if free(a) and free(b) and b > a}
    return sorted(found, key=lambda s: (s != block, s))[:8]


def _fits(run: Run, lo: list[int], hi: list[int]) -> bool:
    """Are these the runs of all coordinates?"""
    d, end = run.gap, run.length - 1
    for i, (a, b) in enumerate(zip(lo, hi, strict=True)):
        center = i // run.block * run.step
        u = 0 if run.low is None else center + run.low
        v = end if run.high is None else center + run.high
        u = u % d if u < 0 else u
        v = v - (v - end + d - 1) // d * d if v > end else v
        if (u, v) != (a, b):
            return False
    return True


def _inward(lo: list[int], hi: list[int], gap: int, length: int) -> Run | None:
    """Windows of Generalized Neighborhood Attention."""
    d = gap
    w = max((b - a) // d + 1 for a, b in zip(lo, hi, strict=True))
    if w < 2 or w * d > length:
        return None
    for causal in (False, True):
        for s in range(1, min(w, length) + 1):
            if all(pair == _window(i, length, w, s, d, causal)
                   for i, pair in enumerate(zip(lo, hi, strict=True))):
                return Run("inward", length, d, step=s, window=w, causal=causal)
    return None


def _window(i: int, length: int, w: int, s: int, d: int, causal: bool) -> tuple[int, int]:
    """First and last key of coordinate `i`."""
    g, p = i % d, i // d
    last = (length - 1 - g) // d
    if causal:
        leader = min(p // s * s + s - 1, last)
        return max(leader - w + 1, 0) * d + g, p * d + g
    leader = min(p // s * s + s // 2, last)
    start = min(max(leader - w // 2, 0), last - (w - 1))
    return start * d + g, (start + w - 1) * d + g
