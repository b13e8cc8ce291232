"""Polynomials with whole coefficients over atoms, and intervals of their values."""

from __future__ import annotations

import functools
import math
from typing import Any

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr

#: monomial (atoms in a fixed order) -> coefficient; the empty monomial is the constant
Poly = dict[tuple[Any, ...], int]
Number = int | float


@functools.lru_cache(maxsize=2**16)
def order(atom: Any) -> tuple[int, str]:
    return (0 if isinstance(atom, Expr) and atom.op == "index" else 1, str(atom))


def plus(*polys: Poly) -> Poly:
    total: Poly = {}
    for poly in polys:
        for monomial, c in poly.items():
            total[monomial] = total.get(monomial, 0) + c
    return {m: c for m, c in total.items() if c}


def times(a: Poly, b: Poly) -> Poly:
    total: Poly = {}
    for m, c in a.items():
        for n, d in b.items():
            monomial = tuple(sorted((*m, *n), key=order))
            total[monomial] = total.get(monomial, 0) + c * d
    return {m: c for m, c in total.items() if c}


def scaled(a: Poly, factor: int) -> Poly:
    return {m: c * factor for m, c in a.items()} if factor else {}


def constant_of(a: Poly) -> int | None:
    return a.get((), 0) if set(a) <= {()} else None


def add_constant(e: Expr, constant: int) -> Expr:
    return E.call("sub", e, -constant) if constant < 0 else E.call("add", e, constant)


def join(terms: list[Expr], constant: int = 0, negative: bool = False) -> Expr:
    if not terms:
        return E.const(constant)
    total = E.call("neg", terms[0]) if negative else terms[0]
    for t in terms[1:]:
        total = E.call("sub" if negative else "add", total, t)
    return add_constant(total, constant) if constant else total


def remove(items: list[Any], those: tuple[Any, ...]) -> bool:
    for x in those:
        if x not in items:
            return False
        items.remove(x)
    return True


def factor_of(p: Poly, atom: Expr) -> tuple[Poly, Poly]:
    """(f, rest) with p = f * atom + rest, for an atom that is nowhere squared."""
    return ({without(m, atom): c for m, c in p.items() if atom in m},
            {m: c for m, c in p.items() if atom not in m})


def without(monomial: tuple[Any, ...], atom: Any) -> tuple[Any, ...]:
    at = monomial.index(atom)
    return monomial[:at] + monomial[at + 1 :]


def floor_of(a: Number, b: Number) -> Number:
    if math.isinf(a):
        return a
    return a // b if not math.isinf(b) else (0 if a >= 0 else -1)


def product_of(intervals: list[tuple[Number, Number]]) -> tuple[Number, Number]:
    low: Number = 1
    high: Number = 1
    for lo, hi in intervals:
        ends = [0 if 0 in (a, b) else a * b for a in (low, high) for b in (lo, hi)]
        low, high = min(ends), max(ends)
    return low, high
