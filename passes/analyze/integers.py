"""Integer index arithmetic in one normal form, and what can be proved of it.

An int `Expr` is a polynomial over atoms (indices, sizes, loads, `//`, `%`, min, max, abs, where).
`Integers` builds such expressions in canonical form, so that equal polynomials are one object, and
decides signs from what it knows of a site: an index along an axis of length n is in [0, n - 1], a
symbolic length is a polynomial of the symbols of the captured graph, each at least its own minimum.
All proofs are by bounding a polynomial from below; no answer means "not proved".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import sympy
import torch

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.passes.analyze import size_terms
from attnopt.passes.analyze.polynomials import (
    Number,
    Poly,
    add_constant,
    constant_of,
    factor_of,
    floor_of,
    join,
    order,
    plus,
    product_of,
    remove,
    scaled,
    times,
)

#: No (q, k) tensor has a longer axis: 2**24 squared elements fit in no memory.
LONGEST = 2**24
#: Steps of proof that one operand may take: some tens for causal, some hundreds for a window on a
#: grid, and a few seconds in the end.
WORK = 50_000
_DEPTH = 6
_ZERO, _ONE = E.const(0), E.const(1)
#: Atoms whose value is that of one of their last two arguments.
_CHOICES = ("minimum", "maximum", "where")


class Integers:
    """Canonical integer expressions of one site, whose axes have the given lengths.

    lengths: axis name -> int, or SymInt of the captured graph
    """

    def __init__(self, lengths: Mapping[str, int | torch.SymInt]) -> None:
        self.symbols: dict[sympy.Expr, Expr] = {}
        self.least: dict[sympy.Expr, int] = {}
        self._sizes: dict[Expr, Poly] = {}
        self._polys: dict[Expr, Poly] = {}
        self._bounds: dict[Expr, tuple[Number, Number]] = {}
        self._facts: list[Poly] = []
        #: steps taken since it was last set to 0; LookupError beyond WORK
        self.work = 0
        self._bind_symbols(lengths)
        self.lengths: dict[str, Expr] = {axis: self.of_size(n) for axis, n in lengths.items()}

    # -- sizes ------------------------------------------------------------------------------
    def _bind_symbols(self, lengths: Mapping[str, int | torch.SymInt]) -> None:
        """Write each symbol of the captured graph as a polynomial of the axis lengths. What a
        length is made of otherwise, as n // 8 - 1 behind convolutions, is taken as a symbol."""
        symbolic = {axis: n.node for axis, n in lengths.items() if isinstance(n, torch.SymInt)}
        axes = sorted(symbolic, key=lambda a: (
            not all(t.is_Symbol for t in size_terms.terms(symbolic[a].expr)),
            len(symbolic[a].expr.free_symbols), "kqhb".find(a[0]), a))
        for axis in axes:
            node = symbolic[axis]
            for term in size_terms.terms(node.expr):
                self.least[term] = size_terms.least(node.shape_env, term)
            unknown = [t for t in size_terms.terms(node.expr) if t not in self.symbols
                       and not t.free_symbols <= self.symbols.keys()]
            if len(unknown) == 1 and unknown[0] not in size_terms.terms(node.expr - unknown[0]):
                (term,), others = unknown, node.expr - unknown[0]
                self.symbols[term] = self.sub(E.size(axis), self.of_sympy(others))
                self._sizes[E.size(axis)] = size_terms.polynomial(node.expr)
                if not term.is_Symbol and others.is_Integer:  # where it has an index, it is no 0
                    self.least[term] = max(self.least[term], 1 - int(others))

    def alias(self, n: Any, axis: str) -> None:
        """Take note that `n`, maybe a symbol of its own, is the length of `axis`."""
        if isinstance(n, torch.SymInt) and n.node.expr.is_Symbol and axis in self.lengths:
            self.symbols.setdefault(n.node.expr, self.lengths[axis])

    def assume(self, e: Expr) -> None:
        """Take note that e >= 0, for an Expr of lengths that the capture has checked."""
        if e.op != "const" and not self.nonneg(e):
            self._facts.append(self.poly(e))

    def of_size(self, n: Any) -> Expr:
        """A length or other size as an Expr. Raises LookupError for an unbound symbol."""
        if isinstance(n, torch.SymInt):
            return self.of_sympy(n.node.expr)
        if isinstance(n, bool) or not isinstance(n, int):
            raise LookupError(f"size must be an int, got {n!r}")
        return E.const(n)

    def of_sympy(self, e: sympy.Expr) -> Expr:
        """A sympy integer of the captured graph in terms of the axis lengths."""
        if e.is_Integer:
            return E.const(int(e))
        if e in self.symbols:
            return self.symbols[e]
        if e.is_Symbol:
            raise LookupError(f"size {e} is not the length of an axis")
        kind, args = type(e).__name__, [self.of_sympy(a) for a in e.args]
        match kind:
            case "Add":
                return self.sum(args)
            case "Mul":
                return self.product(args)
            case "Pow" if e.exp.is_Integer and e.exp > 0:
                return self.product([args[0]] * int(e.exp))
            case "FloorDiv" | "CleanDiv":
                return self.floordiv(*args)
            case "Mod" | "PythonMod":
                return self.mod(*args)
            case "Max" | "Min":
                total = args[0]
                for a in args[1:]:
                    total = (self.maximum if kind == "Max" else self.minimum)(total, a)
                return total
        raise LookupError(f"size {e} is not a polynomial of axis lengths")

    # -- polynomials ------------------------------------------------------------------------
    def poly(self, e: Expr) -> Poly:
        """The polynomial of an int Expr."""
        found = self._polys.get(e)
        if found is None:
            match e.op:
                case "const":
                    found = {(): e.value} if e.value else {}
                case "add":
                    found = plus(self.poly(e.args[0]), self.poly(e.args[1]))
                case "sub":
                    found = plus(self.poly(e.args[0]), scaled(self.poly(e.args[1]), -1))
                case "neg":
                    found = scaled(self.poly(e.args[0]), -1)
                case "mul":
                    found = times(self.poly(e.args[0]), self.poly(e.args[1]))
                case _:
                    found = {(e,): 1}
            self._polys[e] = found
        return found

    def build(self, poly: Poly) -> Expr:
        """The canonical Expr of a polynomial."""
        poly = self._recombine(poly)
        plus, minus = self.halves(poly)
        if minus is _ZERO:
            e = plus
        elif plus.op == "const":
            e = add_constant(join(self._terms(poly, -1), negative=True), poly.get((), 0))
        else:
            rest = {m: c for m, c in poly.items() if m}
            e = add_constant(E.call("sub", join(self._terms(rest, 1)), join(self._terms(rest, -1))),
                     poly.get((), 0))
        self._polys.setdefault(e, poly)
        return e

    def halves(self, poly: Poly) -> tuple[Expr, Expr]:
        """(sum of the positive terms, minus the sum of the negative ones)."""
        return (join(self._terms(poly, 1), constant=max(poly.get((), 0), 0)),
                join(self._terms(poly, -1), constant=max(-poly.get((), 0), 0)))

    @staticmethod
    def _terms(poly: Poly, sign: int) -> list[Expr]:
        terms = [(m, abs(c)) for m, c in poly.items() if m and c * sign > 0]
        terms.sort(key=lambda t: [order(a) for a in t[0]])
        made = []
        for monomial, c in terms:
            term = monomial[0]
            for atom in monomial[1:]:
                term = E.call("mul", term, atom)
            made.append(term if c == 1 else E.call("mul", term, c))
        return made

    def _recombine(self, poly: Poly) -> Poly:
        """(x // d) * d + x % d is x."""
        for monomial, c in poly.items():
            if len(monomial) != 1 or monomial[0].op != "mod":
                continue
            atom = monomial[0]
            x, d = atom.args
            whole = scaled(times(self.poly(E.call("floordiv", x, d)), self.poly(d)), c)
            if all(poly.get(m) == n for m, n in whole.items()):
                rest = plus(poly, {(atom,): -c}, scaled(whole, -1), scaled(self.poly(x), c))
                return self._recombine(rest)
        return poly

    def sum(self, terms: Iterable[Expr]) -> Expr:
        return self.build(plus(*map(self.poly, terms)))

    def product(self, factors: Iterable[Expr]) -> Expr:
        total: Poly = {(): 1}
        for f in factors:
            total = times(total, self.poly(f))
        return self.build(total)

    def add(self, a: Expr, b: Expr) -> Expr:
        return self.sum((a, b))

    def sub(self, a: Expr, b: Expr) -> Expr:
        return self.build(plus(self.poly(a), scaled(self.poly(b), -1)))

    def mul(self, a: Expr, b: Expr) -> Expr:
        return self.product((a, b))

    def neg(self, a: Expr) -> Expr:
        return self.build(scaled(self.poly(a), -1))

    # -- division and extremes --------------------------------------------------------------
    def _split(self, a: Expr, d: Expr) -> tuple[Poly, Poly]:
        """(quotient, rest) with a = quotient * d + rest, as far as the terms tell."""
        divisor = list(self.poly(d).items())
        quotient: Poly = {}
        rest: Poly = {}
        for monomial, c in self.poly(a).items():
            left = list(monomial)
            if len(divisor) == 1 and c % divisor[0][1] == 0 and remove(left, divisor[0][0]):
                quotient[tuple(left)] = c // divisor[0][1]
            elif len(divisor) == 1 and not divisor[0][0] and not monomial:
                quotient[()], rest[()] = divmod(c, divisor[0][1])
            else:
                rest[monomial] = c
        return plus(quotient), plus(rest)

    def floordiv(self, a: Expr, d: Expr) -> Expr:
        """a // d; a positive divisor is divided out of the terms that have it as a factor."""
        if a.op == d.op == "const" or not self.nonneg(self.sub(d, _ONE)):
            return E.call("floordiv", a, d)
        quotient, rest = self._split(a, d)
        return self.build(plus(quotient, self.poly(self._floordiv(self.build(rest), d))))

    def _floordiv(self, a: Expr, d: Expr) -> Expr:
        if self._within(a, d):
            return _ZERO
        return E.call("floordiv", a, d)

    def mod(self, a: Expr, d: Expr) -> Expr:
        """a % d, as Python's."""
        if a.op == d.op == "const" or not self.nonneg(self.sub(d, _ONE)):
            return E.call("mod", a, d)
        rest = self.build(self._split(a, d)[1])
        return rest if self._within(rest, d) else E.call("mod", rest, d)

    def _within(self, a: Expr, d: Expr) -> bool:
        return self.nonneg(a) and self.nonneg(self.sub(self.sub(d, _ONE), a))

    def minimum(self, a: Expr, b: Expr) -> Expr:
        if self.nonneg(self.sub(b, a)):
            return a
        return b if self.nonneg(self.sub(a, b)) else E.call("minimum", a, b)

    def maximum(self, a: Expr, b: Expr) -> Expr:
        if self.nonneg(self.sub(b, a)):
            return b
        return a if self.nonneg(self.sub(a, b)) else E.call("maximum", a, b)

    def abs(self, a: Expr) -> Expr:
        if self.nonneg(a):
            return a
        negated = self.neg(a)
        if self.nonneg(negated):
            return negated
        # |q - k| and |k - q| are one: the form whose first term is positive.
        first = min((m for m in self.poly(a) if m), key=lambda m: [order(x) for x in m])
        return E.call("abs", a if self.poly(a)[first] > 0 else negated)

    # -- bounds and signs -------------------------------------------------------------------
    def bounds(self, e: Expr) -> tuple[Number, Number]:
        """An interval that holds every value of an int Expr."""
        found = self._bounds.get(e)
        if found is None:
            found = self._bounds[e] = self._poly_bounds(self.poly(e))
        return found

    def _poly_bounds(self, p: Poly) -> tuple[Number, Number]:
        low: Number = 0
        high: Number = 0
        for monomial, c in p.items():
            lo, hi = product_of([self._atom_bounds(a) for a in monomial])
            lo, hi = (lo * c, hi * c) if c > 0 else (hi * c, lo * c)
            low, high = low + lo, high + hi
        return low, high

    def _atom_bounds(self, a: Expr) -> tuple[Number, Number]:
        if a.op == "index":
            length = self.lengths.get(a.value)
            return (0, self.bounds(length)[1] - 1 if length is not None else LONGEST)
        if a.op == "size":
            return (1, LONGEST)
        if a.op in ("load", "int"):
            return ((0, 1) if a.op == "int" and a.args[0].dtype == E.BOOL
                    else (-math.inf, math.inf))
        if a.op not in ("mod", "floordiv", "minimum", "maximum", "abs", "where"):
            return (-math.inf, math.inf)
        (lo, hi), (lo2, hi2) = (self.bounds(x) for x in (a.args[-2:] if len(a.args) > 1
                                                         else a.args * 2))
        match a.op:
            case "abs":
                return (max(lo, -hi, 0), max(-lo, hi))
            case "minimum":
                return (min(lo, lo2), min(hi, hi2))
            case "maximum":
                return (max(lo, lo2), max(hi, hi2))
            case "where":
                return (min(lo, lo2), max(hi, hi2))
            case "mod" if lo2 > 0:
                return (0, hi2 - 1)
            case "floordiv" if lo2 > 0:
                return (floor_of(lo, lo2 if lo < 0 else hi2), floor_of(hi, lo2 if hi > 0 else hi2))
        return (-math.inf, math.inf)

    def nonneg(self, e: Expr) -> bool:
        """Proves that e >= 0 for all indices and lengths."""
        return self.bounds(e)[0] >= 0 or self._nonneg(self.poly(e), _DEPTH)

    def _nonneg(self, p: Poly, depth: int) -> bool:
        self.work += 1
        if self.work > WORK:
            raise LookupError("too much to prove")
        if self._poly_bounds(p)[0] >= 0:
            return True
        atoms = sorted({a for m in p for a in m}, key=order)
        cases = [a for a in atoms if a.op in _CHOICES and sum(a in m for m in p) == 1]
        if depth == 0 or not cases and all(
                a.op != "size" and self._atom_bounds(a)[1] < LONGEST - 1 for a in atoms):
            return False  # intervals say all there is to say
        for atom in cases:
            factor, rest = factor_of(p, atom)
            rising = constant_of(factor)
            if rising is not None:
                sides = (self._nonneg(plus(times(factor, self.poly(x)), rest), depth - 1)
                         for x in atom.args[-2:])
                if atom.op == "where" or (atom.op == "minimum") == (rising > 0):
                    return all(sides)
                if any(sides):
                    return True
        for atom in atoms:
            if atom.op == "size" or atom.op in _CHOICES or any(m.count(atom) > 1 for m in p):
                continue
            factor, rest = factor_of(p, atom)
            rises = self._nonneg(factor, depth - 1)
            if not rises and not self._nonneg(scaled(factor, -1), depth - 1):
                continue
            extreme = self._extreme(atom, rises)
            if extreme is not None:
                return self._nonneg(plus(times(factor, self.poly(extreme)), rest), depth - 1)
        return any(self._sizes_nonneg(plus(p, scaled(fact, -1))) for fact in ({}, *self._facts))

    def _extreme(self, atom: Expr, lowest: bool) -> Expr | None:
        """The least or the greatest value of an atom, as an Expr."""
        lo, hi = self._atom_bounds(atom)
        if lowest:
            return E.const(int(lo)) if lo > -math.inf else None
        if atom.op == "index" and atom.value in self.lengths:
            return self.sub(self.lengths[atom.value], _ONE)
        if atom.op == "mod" and self.nonneg(self.sub(atom.args[1], _ONE)):
            return self.sub(atom.args[1], _ONE)
        return E.const(int(hi)) if hi < math.inf else None

    def _sizes_nonneg(self, p: Poly) -> bool:
        """With every length written in symbols and every symbol as its minimum plus a rest >= 0."""
        total: Poly = {}
        for monomial, c in p.items():
            term: Poly = {(): c}
            for atom in monomial:
                if not isinstance(atom, Expr) or atom.op != "size":
                    return False
                shifted: Poly = {}
                for inner, d in self._sizes.get(atom, {(atom,): 1}).items():
                    part: Poly = {(): d}
                    for symbol in inner:
                        part = times(part, {(symbol,): 1, (): self.least.get(symbol, 1)})
                    shifted = plus(shifted, part)
                term = times(term, shifted)
            total = plus(total, term)
        return all(c >= 0 for c in total.values())
