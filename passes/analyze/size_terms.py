"""Sizes of a captured graph as polynomials: what they are made of, and how small that may be.

A length is a symbol s, a polynomial of symbols, or, behind convolutions and strides, one of
quotients: s // 8 - 1. `terms` are symbols and such quotients, in which a length is a polynomial.
"""

from __future__ import annotations

from typing import Any

import sympy

from attnopt.passes.analyze.polynomials import Poly


def terms(e: sympy.Expr) -> list[sympy.Expr]:
    """What a size is a polynomial of, each once."""
    if e.is_number:
        return []
    if e.is_Add or e.is_Mul or e.is_Pow and e.exp.is_Integer and e.exp > 0:
        return list(dict.fromkeys(t for a in e.args for t in terms(a)))
    return [e]


def least(shapes: Any, term: sympy.Expr) -> int:
    """The least value of a term in the range that the capture found; 0 where it found none."""
    if shapes is None:
        return 0
    known = shapes.var_to_range.get(term) if term.is_Symbol else shapes.bound_sympy(term)
    return int(known.lower) if known is not None and known.lower.is_Integer else 0


def polynomial(e: sympy.Expr) -> Poly:
    """A size as a polynomial of its terms."""
    poly = sympy.Poly(e, *terms(e))
    return {tuple(s for s, n in zip(poly.gens, powers, strict=True) for _ in range(n)): int(c)
            for powers, c in poly.terms()}
