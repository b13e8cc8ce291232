"""Masks over tokens that form a row-major grid: neighbourhoods and partitions into windows.

Neighbourhoods are those of Generalized Neighborhood Attention (arXiv 2504.16922): per axis a
window of fixed size around the leader of the query's stride group, pushed inward at the borders.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.mask_base import DIAGONAL, K, Mask, Q, tuple_fields, wrap_fields


def _by(lengths: Sequence[Any]) -> str:
    return "x".join(map(str, lengths))


def coordinates(token: Expr, length: tuple[int | None, ...]) -> list[tuple[Expr, Expr]]:
    """(coordinate, length) of a token along every axis of a row-major grid.

    The first length may be None: as many as the size of the token's axis gives.
    """
    pairs = []
    for i, own in enumerate(length):
        inside = math.prod(n for n in length[i + 1 :] if n is not None)
        total = E.size("q" if Q in token.leaves else "k") // inside if own is None else own
        place = token // inside
        pairs.append((place if i == 0 else place % total, E.wrap(total)))
    return pairs


def _check_grid(length: tuple[int | None, ...], dims: int) -> None:
    if len(length) != dims:
        raise ValueError(f"length must have {dims} axes, got {length}")
    if any(n is None for n in length[1:]):
        raise ValueError(f"length must be concrete on all axes but the first, got {length}")


@dataclass(frozen=True)
class Neighborhood(Mask):
    """Generalized neighbourhood: the window around each token of a row-major grid.

    length:   grid lengths; the first may be None (taken from the number of tokens)
    window:   keys per axis; stride: queries that share a window; dilation: gap between keys
    causal:   per axis, only coordinates up to the query's own
    """

    window: tuple[int, ...]
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    causal: tuple[bool, ...] = ()
    length: tuple[int | None, ...] = (None,)
    name = "neighborhood"

    def __post_init__(self) -> None:
        tuple_fields(self, "window", "stride", "dilation", "causal", "length")
        dims = len(self.window)
        for field, default in (("stride", 1), ("dilation", 1), ("causal", False)):
            given = getattr(self, field) or (default,) * dims
            if len(given) != dims:
                raise ValueError(f"{field} must have {dims} axes, got {given}")
            object.__setattr__(self, field, given)
        _check_grid(self.length, dims)
        for n, w, s, d in zip(self.length, self.window, self.stride, self.dilation, strict=True):
            if not 1 <= s <= w:
                raise ValueError(f"stride must be in [1, window {w}], got {s}")
            if d < 1 or n is not None and w * d > n:
                raise ValueError(f"window * dilation must be at most {n}, got {w} * {d}")

    def _build(self) -> Expr:
        kept = E.TRUE
        axes = zip(coordinates(Q, self.length), coordinates(K, self.length),
                   self.window, self.stride, self.dilation, self.causal, strict=True)
        for (i, total), (j, _), w, s, d, causal in axes:
            kept = kept & (j % d).eq(i % d)
            p, r = i // d, j // d
            last = (total - i % d + (d - 1)) // d - 1  # of the query's dilation group
            step = s - 1 if causal else s // 2
            leader = E.call("minimum", p // s * s + step, last) if s > 1 else p
            if causal:
                kept = kept & (r <= p) & (leader - r < w)
            else:
                start = E.call("minimum", E.call("maximum", leader - w // 2, 0), last - (w - 1))
                kept = kept & (start <= r) & (r < start + w)
        return kept

    def keeps(self, key: Expr, assume: Sequence[Expr] = ()) -> bool:
        # A window always holds the whole stride group around its leader, as stride <= window.
        return key is DIAGONAL

    def describe(self) -> str:
        text = f"window {_by(self.window)}"
        if set(self.stride) != {1}:
            text += f" stride {_by(self.stride)}"
        if set(self.dilation) != {1}:
            text += f" dilation {_by(self.dilation)}"
        return text + (" causal" if any(self.causal) else "")


@dataclass(frozen=True)
class Windows(Mask):
    """Tokens of a row-major grid attend within boxes of `window` that tile it from the origin."""

    window: tuple[Expr, ...]
    length: tuple[int | None, ...] = (None,)
    name = "windows"

    def __post_init__(self) -> None:
        tuple_fields(self, "window", "length")
        wrap_fields(self, "window")
        _check_grid(self.length, len(self.window))

    def _build(self) -> Expr:
        kept = E.TRUE
        for w, (i, _), (j, _) in zip(self.window, coordinates(Q, self.length),
                                     coordinates(K, self.length), strict=True):
            own = w.replace({E.size("q"): E.size("k")})
            kept = kept & (i // w).eq(j // own)
        return kept

    def keeps(self, key: Expr, assume: Sequence[Expr] = ()) -> bool:
        return key is DIAGONAL and not any(w.has("size") for w in self.window)

    def describe(self) -> str:
        return f"partition {_by(self.window)}"
