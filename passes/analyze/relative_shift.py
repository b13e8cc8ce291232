"""Places of a row-major view whose rows are as long as others plus or minus a few: the shift.

Transformer-XL (arXiv 1901.02860), Music Transformer (arXiv 1809.04281) and their kind move row q of
a table by q places: a column is added, the memory read with rows of another length, a row dropped
and the old shape taken again. So an element is at flat = q * (L - 1) + k + c, in rows of L:

    flat = q * L + (k - q + c)        row q, place k - q + c        where 0 <= k - q + c < L

which is not a matter of which terms have L as a factor: every coefficient is cut at the nearest
multiple of L. Where the place may lie in the next row, it is one of two cases, which the causal
mask of such models decides (`relative_tables.seen`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr

if TYPE_CHECKING:
    from attnopt.passes.analyze.logic import Logic

_ZERO, _ONE = E.const(0), E.const(1)
Monomial = tuple[Any, ...]


def unflattened(logic: Logic, flat: Expr, lengths: list[Expr], sizes: list[int],
                cases: bool = False) -> list[Expr]:
    """The indices of a row-major place in dimensions of these lengths, as Exprs and numbers.

    cases: as case trees where a place may lie in the next row
    """
    parts = []
    for d in reversed(range(len(lengths))):
        if all(n == 1 for n in sizes[:d]):
            parts.append(flat)
            flat = _ZERO
            continue
        pair = _row_and_place(logic, flat, lengths[d], cases) if flat.op != "where" else None
        if pair is None:
            n = lengths[d]
            pair = (logic.spread(lambda e, n=n: logic.floordiv(e, n), flat),
                    logic.spread(lambda e, n=n: logic.mod(e, n), flat))
        flat, place = pair
        parts.append(place)
    return parts[::-1]


def _row_and_place(logic: Logic, flat: Expr, length: Expr, cases: bool
                   ) -> tuple[Expr, Expr] | None:
    """(flat // length, flat % length) where cutting at the nearest multiple tells; else None."""
    if not {"q", "k"} <= flat.indices or not logic.nonneg(logic.sub(length, _ONE)):
        return None
    row = _nearest(logic, flat, length)
    if row is None:
        return None
    place = logic.sub(flat, logic.mul(row, length))
    if not logic.nonneg(place):
        return None
    beyond = logic.sub(place, length)
    if logic.nonneg(logic.neg(logic.add(beyond, _ONE))):
        return row, place
    if not cases or not logic.nonneg(logic.sub(logic.sub(length, _ONE), beyond)):
        return None
    inside = logic.compare("lt", place, length)
    return (logic.choose(inside, row, logic.add(row, _ONE)), logic.choose(inside, place, beyond))


def _nearest(logic: Logic, flat: Expr, length: Expr) -> Expr | None:
    """The multiple of `length` that is nearest to `flat`, term by term."""
    terms = logic.poly(flat)
    if length.op == "const":
        near = {m: round(c / length.value) for m, c in terms.items() if m}
        row = logic.build({m: c for m, c in near.items() if c})
        low = logic.bounds(logic.sub(flat, logic.mul(row, length)))[0]
        return logic.add(row, E.const(int(low // length.value))) if math.isfinite(low) else None
    heads = [(m, c) for m, c in logic.poly(length).items() if m]
    if len(heads) != 1:
        return None
    (head, factor), = heads
    row = _ZERO
    while True:  # long division, by those terms that vary with the score
        rest = logic.poly(logic.sub(flat, logic.mul(row, length)))
        term = next((logic.mul(E.const(c // factor), logic.product(left))
                     for monomial, c in sorted(rest.items(), key=lambda t: -len(t[0]))
                     if c % factor == 0 and (left := _without(monomial, head)) is not None
                     and any(a.op == "index" for a in left)), None)
        if term is None:
            return row
        row = logic.add(row, term)


def _without(monomial: Monomial, head: Monomial) -> list[Expr] | None:
    """The factors that are left without those of `head`; None where it has not all of them."""
    left = list(monomial)
    for atom in head:
        if atom not in left:
            return None
        left.remove(atom)
    return left
