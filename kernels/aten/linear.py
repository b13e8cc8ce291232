"""Logits read as scale * factors * score + terms."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.spec import Spec


@dataclass(frozen=True)
class Linear:
    """scale * product(factors) * score + sum(terms); nothing but `score` holds the score."""

    scale: float = 1.0
    factors: tuple[Expr, ...] = ()
    terms: tuple[Expr, ...] = ()

    def times(self, by: Expr) -> Linear:
        terms = tuple(t * by for t in self.terms)
        if by.op == "const":
            return Linear(self.scale * by.value, self.factors, terms)
        return Linear(self.scale, (*self.factors, by), terms)

    def plus(self, term: Expr) -> Linear:
        return Linear(self.scale, self.factors, (*self.terms, term))

    def sum(self) -> Expr:
        return functools.reduce(Expr.__add__, self.terms)


@functools.lru_cache(maxsize=1024)
def linear(logits: Expr) -> Linear | None:
    """The parts of logits that are linear in the score, or None."""
    if logits is E.score:
        return Linear()
    if logits.op not in ("add", "sub", "mul", "div", "neg") or E.score not in logits.leaves:
        return None
    inside = [a for a in logits.args if E.score in a.leaves]
    if len(inside) != 1:
        return None
    found = linear(inside[0])
    if found is None or logits.op == "neg":
        return found and found.times(E.const(-1.0))
    first = inside[0] is logits.args[0]
    other = logits.args[1 if first else 0]
    match logits.op:
        case "add":
            return found.plus(other)
        case "sub":
            return found.plus(-other) if first else found.times(E.const(-1.0)).plus(other)
        case "mul":
            return found.times(other)
        case "div" if first and not (other.op == "const" and other.value == 0):
            # A constant divisor: its reciprocal is exact for powers of two, else off by one ulp.
            return found.times(E.const(1.0 / other.value) if other.op == "const" else 1.0 / other)
    return None


def varies(expr: Expr, spec: Spec) -> frozenset[str]:
    """Names of the axes along which an expression varies."""
    axes = set(expr.indices)
    for leaf in expr.leaves:
        if leaf.op == "load" and not leaf.args:
            own = spec.operand(leaf.value).axes
            axes |= {"q", "k", "h", "b"} if own is None else set(own)
        elif leaf.op == "inner":
            axes |= {"q", "k", "h", "b"}
    return frozenset(axes)
