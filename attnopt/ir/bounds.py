"""Interval arithmetic and three-valued logic over tensors of tiles.

A `Bounds` holds every number that an int or float `Expr` can be within a tile, a `Truth` says
whether a bool `Expr` can be true, and whether it can be false. All functions here are sound: what
they leave out cannot happen. An unbounded side is infinite, and ints are exact up to 2**52.

Floats are bounded only where no rounding enters (loads, constants, minimum, maximum, abs, neg,
where, and conversions of ints, which are widened by what a half precision would round): kernels
compute them in other precisions than the evaluator does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr

#: float64 holds every int up to here, and the sum of two of them
EXACT = 2.0**52
#: what rounding to bfloat16 changes at most, relatively, and the range of float16
ROUNDING, LARGEST_HALF, SMALLEST_HALF = 2.0**-8, 65504.0, 2.0**-24


@dataclass(frozen=True)
class Bounds:
    """lo <= x <= hi (float64), or x is nan where `nan`; the tensors broadcast over tiles."""

    lo: Tensor
    hi: Tensor
    nan: Tensor

    @staticmethod
    def of(lo: Tensor, hi: Tensor, nan: Tensor | None = None) -> Bounds:
        return Bounds(lo, hi, torch.zeros_like(lo, dtype=torch.bool) if nan is None else nan)


@dataclass(frozen=True)
class Truth:
    """`may`: can be true somewhere in the tile; `may_not`: can be false somewhere."""

    may: Tensor
    may_not: Tensor


def exact(lo: Tensor, hi: Tensor) -> Bounds:
    """Bounds of ints; beyond what float64 holds exactly they become infinite."""
    lo = torch.where(lo > EXACT, EXACT, torch.where(lo < -EXACT, -math.inf, lo))
    hi = torch.where(hi < -EXACT, -EXACT, torch.where(hi > EXACT, math.inf, hi))
    return Bounds.of(lo, hi)


def unknown(expr: Expr, device: torch.device | None = None) -> Bounds:
    """Any number of the type of `expr`."""
    whole = torch.full((1, 1), math.inf, dtype=torch.float64, device=device)
    return Bounds(-whole, whole, torch.full_like(whole, expr.dtype == E.FLOAT, dtype=torch.bool))


def rounded(x: Bounds) -> Bounds:
    """`x` after it has been rounded to any of the float types."""
    def widen(bound: Tensor, sign: int) -> Tensor:
        wide = bound + sign * (bound.abs() * ROUNDING + SMALLEST_HALF)
        wide = torch.where(wide.abs() > LARGEST_HALF, torch.copysign(
            torch.full_like(wide, math.inf), wide), wide)
        # Ints of 8 bits and simple fractions come through as they are.
        same = bound.to(torch.bfloat16).double() == bound
        normal = (bound.abs() <= LARGEST_HALF) & (bound.abs() >= 2.0**-14)
        keep = same & normal | (bound == 0) | bound.isinf()
        # An infinity that rounding may or may not reach bounds nothing from the other side.
        away = wide.isinf() & (torch.sign(wide) != sign)
        wide = torch.where(away, torch.copysign(torch.full_like(wide, LARGEST_HALF), wide), wide)
        return torch.where(keep, bound, wide)
    return Bounds(widen(x.lo, -1), widen(x.hi, 1), x.nan)


# -- numbers ------------------------------------------------------------------------------------
def number(expr: Expr, args: list[Bounds | Truth]) -> Bounds:
    """Bounds of one int or float operation."""
    if expr.op == "where":
        condition, yes, no = args
        assert isinstance(condition, Truth) and isinstance(yes, Bounds) and isinstance(no, Bounds)
        return _where(condition, yes, no)
    if len(args) == 1 and isinstance(args[0], Truth):
        lo, hi = (~args[0].may_not).double(), args[0].may.double()
        return Bounds.of(lo, hi) if expr.op in ("int", "float") else unknown(expr, lo.device)
    x = args[0]
    assert isinstance(x, Bounds)
    if expr.op == "float" and expr.args[0].dtype == E.INT:
        return rounded(x)
    known = _SELECTING if expr.dtype == E.FLOAT else _INT
    if expr.op not in known or any(a.dtype != expr.dtype for a in expr.args):
        return unknown(expr, x.lo.device)
    return known[expr.op](*args)


def _where(condition: Truth, yes: Bounds, no: Bounds) -> Bounds:
    t, f = condition.may, condition.may_not
    lo = torch.where(t & f, torch.minimum(yes.lo, no.lo), torch.where(t, yes.lo, no.lo))
    hi = torch.where(t & f, torch.maximum(yes.hi, no.hi), torch.where(t, yes.hi, no.hi))
    return Bounds(lo, hi, t & yes.nan | f & no.nan)


def _neg(x: Bounds) -> Bounds:
    return Bounds(-x.hi, -x.lo, x.nan)


def _abs(x: Bounds) -> Bounds:
    lo = torch.maximum(x.lo, -x.hi).clamp(min=0)
    return Bounds(lo, torch.maximum(-x.lo, x.hi), x.nan)


def _minimum(x: Bounds, y: Bounds) -> Bounds:
    return Bounds(torch.minimum(x.lo, y.lo), torch.minimum(x.hi, y.hi), x.nan | y.nan)


def _maximum(x: Bounds, y: Bounds) -> Bounds:
    return Bounds(torch.maximum(x.lo, y.lo), torch.maximum(x.hi, y.hi), x.nan | y.nan)


def _hull(corners: list[Tensor]) -> tuple[Tensor, Tensor]:
    lo = hi = corners[0]
    for corner in corners[1:]:
        lo, hi = torch.minimum(lo, corner), torch.maximum(hi, corner)
    return lo, hi


def _mul(x: Bounds, y: Bounds) -> Bounds:
    # 0 * inf is 0 here: an infinite bound stands for finite numbers of any size.
    return exact(*_hull([torch.nan_to_num(a * b, nan=0.0, posinf=math.inf, neginf=-math.inf)
                         for a in (x.lo, x.hi) for b in (y.lo, y.hi)]))


def _floordiv(x: Bounds, y: Bounds) -> Bounds:
    signed = (y.lo > 0) | (y.hi < 0)
    lo, hi = _hull([torch.floor(a / b) for a in (x.lo, x.hi) for b in (y.lo, y.hi)])
    # inf / inf is nan: nothing is known of it
    lo = torch.where(signed & ~lo.isnan(), lo, -math.inf)
    hi = torch.where(signed & ~hi.isnan(), hi, math.inf)
    return exact(lo, hi)


def _mod(x: Bounds, y: Bounds) -> Bounds:
    period = torch.floor(x.lo / y.lo)
    one = (y.lo == y.hi) & (y.lo > 0) & (period == torch.floor(x.hi / y.lo))
    small = (x.lo >= 0) & (x.hi < y.lo)
    positive, negative = y.lo > 0, y.hi < 0
    lo = torch.where(positive, 0.0, torch.where(negative, y.lo + 1, -math.inf))
    hi = torch.where(positive, y.hi - 1, torch.where(negative, 0.0, math.inf))
    hi = torch.where(positive & (x.lo >= 0), torch.minimum(hi, x.hi), hi)
    lo = torch.where(one, x.lo - period * y.lo, torch.where(small, x.lo, lo))
    hi = torch.where(one, x.hi - period * y.lo, torch.where(small, x.hi, hi))
    return exact(lo, hi)


_SELECTING: dict[str, Callable[..., Bounds]] = {
    "neg": _neg, "abs": _abs, "minimum": _minimum, "maximum": _maximum}
_INT: dict[str, Callable[..., Bounds]] = {
    **_SELECTING,
    "add": lambda x, y: exact(x.lo + y.lo, x.hi + y.hi),
    "sub": lambda x, y: exact(x.lo - y.hi, x.hi - y.lo),
    "mul": _mul, "floordiv": _floordiv, "mod": _mod,
}


# -- truth --------------------------------------------------------------------------------------
def truth(expr: Expr, args: list[Bounds | Truth]) -> Truth:
    """Whether one bool operation may be true, and whether it may be false."""
    if expr.op == "where":
        c, yes, no = args
        assert isinstance(c, Truth) and isinstance(yes, Truth) and isinstance(no, Truth)
        return Truth(c.may & yes.may | c.may_not & no.may,
                     c.may & yes.may_not | c.may_not & no.may_not)
    if expr.op in _LOGIC:
        return _LOGIC[expr.op](*args)
    x, *rest = (_as_number(a) for a in args)
    if expr.op == "isnan":
        return Truth(x.nan, torch.ones_like(x.nan))
    if expr.op == "bool":
        rest = [Bounds.of(torch.zeros_like(x.lo), torch.zeros_like(x.lo))]
    y = rest[0]
    nan = x.nan | y.nan
    if expr.op == "lt":
        return Truth(x.lo < y.hi, (x.hi >= y.lo) | nan)
    if expr.op == "le":
        return Truth(x.lo <= y.hi, (x.hi > y.lo) | nan)
    meet = (x.lo <= y.hi) & (y.lo <= x.hi)
    point = (x.lo == x.hi) & (y.lo == y.hi) & (x.lo == y.lo)
    if expr.op == "eq":
        return Truth(meet, ~point | nan)
    if expr.op in ("ne", "bool"):
        return Truth(~point | nan, meet)
    raise ValueError(f"expr must be a bool operation, got {expr.op}")


def _as_number(x: Bounds | Truth) -> Bounds:
    return x if isinstance(x, Bounds) else Bounds.of((~x.may_not).double(), x.may.double())


_LOGIC: dict[str, Callable[..., Truth]] = {
    "and": lambda a, b: Truth(a.may & b.may, a.may_not | b.may_not),
    "or": lambda a, b: Truth(a.may | b.may, a.may_not & b.may_not),
    "xor": lambda a, b: Truth(a.may & b.may_not | a.may_not & b.may,
                              a.may & b.may | a.may_not & b.may_not),
    "not": lambda a: Truth(a.may_not, a.may),
}
