"""Strips: all rows of an index matrix as windows into a few vectors.

An index J[q, k] of relative positions repeats itself along a diagonal: J[q, k] = J[q + s, k + t]
wherever both sides exist, with s = t = 1 for distances k - q (T5, any Toeplitz matrix), s = t = W
for offsets on a row-major grid of width W (Swin, BEiT), H * W for three axes, and s != t where
queries are every other key (LeViT). Rows q = c, c + s, c + 2 s … of a chain c are then windows of
one vector of length L = K + (Q / s - 1) t, so that with m = q // s

    J[q, k] = strip[c * L + (Q / s - 1 - m) * t + k]

and the vectors of all chains, one after the other, are the strip: Q + K - 1 entries for distances,
2 W N - W^2 for a grid, never Q x K. In a kernel neighbouring keys are neighbours in the strip, so
that a look-up is a plain vector load. `extra` tokens before the grid (a class token) have rows of
their own, and as keys they have one value for all rows of the grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.mask_base import K, Q

_NONE = E.const(0)
#: tokens before the grid
_EXTRAS = (0, 1, 2)
#: scores to one entry of a strip from which on it is worth having
LEAST_SCORES = 1.5


@dataclass(frozen=True)
class Strip:
    """Where the rows of an index matrix are.

    rows, keys: the shift (s, t) that it repeats under; extra: tokens before the grid
    queries, length: lengths Q, K of the scores; ints, but for rows = keys = 1 without extras
    """

    rows: int = 1
    keys: int = 1
    extra: int = 0
    queries: Expr = E.size("q")
    length: Expr = E.size("k")

    @property
    def window(self) -> Expr:
        """Entries of a chain."""
        return self.grid_keys + (self.turns - 1) * self.keys

    @property
    def grid_keys(self) -> Expr:
        return self.length - self.extra

    @property
    def turns(self) -> Expr:
        """Rows of a chain."""
        return (self.queries - self.extra) // self.rows

    @property
    def main(self) -> Expr:
        """Entries before those of extra tokens."""
        return self.window * self.rows + self.extra

    @property
    def count(self) -> Expr:
        """Entries of the strip."""
        if not self.extra:
            return self.main
        return self.main + self.length * self.extra + self.length

    def places(self, q: Expr = Q, k: Expr = K) -> tuple[Expr, Expr]:
        """The entries of extra keys and of the others; each is what the row says, plus k."""
        row = q - self.extra
        turn = self.turns - 1 - row // self.rows
        start = E.const(0) if self.rows == 1 else row % self.rows * self.window
        start = start + turn * self.keys
        if not self.extra:
            return start + k, start + k
        # Rows of extra tokens lie behind the chains, the values of extra keys behind those.
        own = self.main + q * self.length
        behind = self.main + self.length * self.extra
        among = q < self.extra
        return E.where(among, own, behind) + k, E.where(among, own, start) + k

    def pair(self, point: Expr) -> tuple[Expr, Expr]:
        """A (q, k) whose value the entry at `point` is."""
        at = E.call("maximum", point - self.extra, 0)
        chain = E.const(0) if self.rows == 1 else E.call(
            "minimum", at // self.window, self.rows - 1)
        inside = at - chain * self.window
        turn = E.call("minimum", inside // self.keys, self.turns - 1)
        q = (self.turns - 1 - turn) * self.rows + chain + self.extra
        k = E.call("minimum", inside - turn * self.keys + self.extra, self.length - 1)
        if not self.extra:
            return q, k
        own = point - self.main
        behind = own - self.length * self.extra
        extra_key = E.call("minimum", behind, self.extra - 1)
        return (E.where(own < 0, q, E.where(behind < 0, own // self.length, self.extra)),
                E.where(own < 0, k, E.where(behind < 0, own % self.length, extra_key)))


def strip_of(matrices: list[Tensor]) -> Strip | None:
    """The shortest strip of integer matrices (Q, K) of one shape; None where none is worth it."""
    queries, length = matrices[0].shape
    best: Strip | None = None
    for extra in _EXTRAS:
        if min(queries, length) <= 2 * extra + 1:
            break
        inner = [m[extra:, extra:] for m in matrices]
        if extra and not all(_same_rows(m[extra:, :extra]) for m in matrices):
            continue
        shift = _shift(inner)
        if shift is None:
            continue
        found = Strip(*shift, extra, E.const(queries), E.const(length))
        if found.count.value * LEAST_SCORES > queries * length:
            continue
        if best is None or found.count.value < best.count.value:
            best = found
    return best


def dimensions(matrix: Tensor, strip: Strip) -> int:
    """1 for distances, 2 for a grid, 3 for a grid of grids."""
    if strip.rows == strip.keys == 1:
        return 1
    inner = matrix[strip.extra :, strip.extra :][: strip.rows, : strip.keys]
    return 2 if _repeats(inner, 1, 1) or strip.rows != strip.keys else 3


def _shift(matrices: list[Tensor]) -> tuple[int, int] | None:
    """The smallest (s, t) with J[q, k] = J[q + s, k + t] and s | Q."""
    queries, length = matrices[0].shape
    square = queries == length
    for rows in _divisors(queries):
        for keys in (rows,) if square else _divisors(length):
            if all(_repeats(m, rows, keys) for m in matrices):
                return rows, keys
    return None


def _repeats(m: Tensor, rows: int, keys: int) -> bool:
    a, b = m[:-rows, :-keys], m[rows:, keys:]
    if not a.numel():
        return False
    return torch.equal(a[0], b[0]) and torch.equal(a[-1], b[-1]) and torch.equal(a, b)


def _same_rows(m: Tensor) -> bool:
    return torch.equal(m, m[:1].expand_as(m))


def _divisors(n: int) -> list[int]:
    """Divisors of n below n."""
    return [d for d in range(1, n // 2 + 1) if n % d == 0]
