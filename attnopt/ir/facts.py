"""Facts about the integer part of an `Expr`, proven with sympy for all sizes.

    prove(e)         True / False where the bool `e` holds / fails for every index and every size,
                     None where neither is shown
    slack(e)         the int that is >= 0 exactly where the comparison `e` holds
    linear(e)        an int as sum of coefficient * atom plus a constant
    simplify_int(e)  the same int in that normal form

An index lies in [0, size - 1], a size is at least 1 (`assume` adds more), operands are unknown.
sympy sees sums and products of atoms only. Booleans, case distinctions, `//`, `%`, minimum and
maximum stay our own nodes: as sympy objects they are re-sorted, turned into one another and, on
window arithmetic, grow without bound.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import sympy

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr

_RING = ("add", "sub", "mul", "neg")
_COMPARE = ("lt", "le", "eq", "ne")
_ONE, _MINUS_ONE = E.const(1), E.const(-1)


# -- normal form --------------------------------------------------------------------------------
@functools.lru_cache(maxsize=8192)
def _symbol(atom: Expr) -> sympy.Symbol:
    return sympy.Symbol(str(atom), integer=True)


def _ring(e: Expr, atoms: dict[sympy.Symbol, Expr]) -> sympy.Expr:
    """`e` as a polynomial in its atoms, which are simplified and collected in `atoms`."""
    if e.op == "const":
        return sympy.Integer(int(e.value))
    if e.op in _RING:
        a, *rest = (_ring(x, atoms) for x in e.args)
        return {"add": lambda: a + rest[0], "sub": lambda: a - rest[0],
                "mul": lambda: a * rest[0], "neg": lambda: -a}[e.op]()
    atom = _simplify_atom(e)
    if atom is not e and atom.op in (*_RING, "const"):
        return _ring(atom, atoms)
    atoms[_symbol(atom)] = atom
    return _symbol(atom)


def _polynomial(e: Expr) -> tuple[sympy.Expr, dict[sympy.Symbol, Expr]]:
    atoms: dict[sympy.Symbol, Expr] = {}
    return sympy.expand(_ring(e, atoms)), atoms


def _rebuild(poly: sympy.Expr, atoms: dict[sympy.Symbol, Expr]) -> Expr:
    """A polynomial as Expr: terms by text, the constant last."""
    total: Expr | None = None
    constant = 0
    terms = []
    for monomial, coefficient in poly.as_coefficients_dict().items():
        if monomial == 1:
            constant = int(coefficient)
            continue
        factors = [atoms[base] for base, power in monomial.as_powers_dict().items()
                   for _ in range(int(power))]
        product = functools.reduce(Expr.__mul__, sorted(factors, key=str))
        terms.append((int(coefficient) < 0, str(product), product, int(coefficient)))
    for _, _, product, coefficient in sorted(terms, key=lambda t: t[:2]):
        if total is None:
            total = product if coefficient == 1 else product * coefficient
        elif coefficient < 0:
            total = total - (product if coefficient == -1 else product * -coefficient)
        else:
            total = total + (product if coefficient == 1 else product * coefficient)
    if total is None:
        return E.const(constant)
    return total - -constant if constant < 0 else total + constant


@functools.lru_cache(maxsize=8192)
def simplify_int(e: Expr) -> Expr:
    """The same int with sums collected and `//`, `%` by constants reduced."""
    if e.dtype != E.INT:
        raise ValueError(f"e must be an int expression, got {e}")
    return _rebuild(*_polynomial(e))


def _simplify_atom(e: Expr) -> Expr:
    """An int that is no sum or product, with its arguments simplified."""
    if not e.args or e.op == "load":
        return e if not e.args else E.rebuild(e, tuple(_simplify_any(a) for a in e.args))
    args = tuple(_simplify_any(a) for a in e.args)
    if e.op in ("floordiv", "mod") and args[1].op == "const" and args[1].value > 0:
        return _divide(e.op, args[0], args[1].value)
    return E.rebuild(e, args)


def _simplify_any(e: Expr) -> Expr:
    return simplify_int(e) if e.dtype == E.INT else e


def _divide(op: str, a: Expr, n: int) -> Expr:
    """a // n or a % n: multiples of n leave the dividend, a small dividend answers at once."""
    poly, atoms = _polynomial(a)
    whole = sympy.Integer(0)
    for monomial, coefficient in poly.as_coefficients_dict().items():
        # A constant keeps its remainder, so that (8 * x + 11) // 8 is x + 1 + 3 // 8.
        multiple = coefficient // n if monomial == 1 or coefficient % n == 0 else 0
        whole += multiple * monomial
    rest = _rebuild(sympy.expand(poly - n * whole), atoms)
    low, high = _at_least(rest), _at_least(E.const(n - 1) - rest)
    if low is not None and low >= 0 and high is not None and high >= 0:
        return _rebuild(whole, atoms) if op == "floordiv" else rest
    if op == "mod":
        return E.call("mod", rest, n)
    quotient = E.call("floordiv", rest, n)
    return quotient if whole == 0 else _rebuild(whole, atoms) + quotient


def linear(e: Expr) -> tuple[dict[Expr, int], int] | None:
    """({atom: coefficient}, constant) of an int, or None where it is not linear in its atoms."""
    poly, atoms = _polynomial(e)
    coefficients, constant = {}, 0
    for monomial, coefficient in poly.as_coefficients_dict().items():
        if monomial == 1:
            constant = int(coefficient)
        elif monomial in atoms:
            coefficients[atoms[monomial]] = int(coefficient)
        else:
            return None
    return coefficients, constant


def slack(e: Expr) -> Expr | None:
    """The int Expr that is >= 0 exactly where the comparison `e` holds, else None."""
    if e.op == "not" and e.args[0].op in ("lt", "le"):
        a, b = e.args[0].args
        e = b <= a if e.args[0].op == "lt" else b < a
    if e.op not in ("lt", "le") or e.args[0].dtype != E.INT:
        return None
    a, b = e.args
    return simplify_int(b - a - (1 if e.op == "lt" else 0))


# -- bounds ---------------------------------------------------------------------------------------
def _choices(e: Expr) -> list[Expr]:
    """Values without minimum, maximum, abs or where, one of which `e` always is."""
    for node in e.walk():
        if node.dtype == E.INT and node.op in ("minimum", "maximum", "where", "abs"):
            either = (node.args[0], -node.args[0]) if node.op == "abs" else node.args[-2:]
            return [c for x in either for c in _choices(e.replace({node: x}))]
    return [e]


def _at_least(e: Expr, assume: frozenset[Expr] = frozenset(), depth: int = 3) -> int | None:
    """A number that `e` never falls below, or None where none is found."""
    poly, atoms = _polynomial(e)
    bound = sympy.Integer(0)
    for monomial, coefficient in poly.as_coefficients_dict().items():
        term = coefficient
        for base, power in monomial.as_powers_dict().items():
            if base == 1:
                continue
            limits = _limits(atoms[base], depth)
            if limits is None or limits[0] is None:
                return None
            side = limits[0] if coefficient > 0 else limits[1]
            if side is None:
                return None
            term *= side**power
        bound += term
    return _least(sympy.expand(bound), assume)


def _limits(atom: Expr, depth: int) -> tuple[sympy.Expr, sympy.Expr | None] | None:
    """(lower, upper) of a non-negative atom in terms of sizes; upper None where unknown."""
    if atom.op == "index":
        return sympy.Integer(0), _symbol(E.size(atom.value)) - 1
    if atom.op == "size":
        own = _symbol(atom)
        return own, own
    if atom.op == "stat":
        return sympy.Integer(0), None
    if atom.op == "int" and atom.args[0].dtype == E.BOOL:
        return sympy.Integer(0), sympy.Integer(1)
    if depth and atom.op in ("mod", "floordiv"):
        a, n = atom.args
        if n.op == "const" and n.value > 0 and atom.op == "mod":
            return sympy.Integer(0), sympy.Integer(n.value - 1)
        if n.op == "size" and atom.op == "mod":
            return sympy.Integer(0), _symbol(n) - 1
        low = _at_least(a, depth=depth - 1)
        positive = n.op == "size" or n.op == "const" and n.value > 0
        if positive and low is not None and low >= 0:
            high = _limits(a, depth - 1) if a.op in ("index", "size") else None
            return sympy.Integer(0), None if high is None else high[1]
    return None


def _least(poly: sympy.Expr, assume: frozenset[Expr]) -> int | None:
    """A lower bound of a polynomial in sizes: each is 1 + t with t >= 0, or as `assume` says."""
    base: dict[sympy.Symbol, sympy.Expr] = {}
    for i, fact in enumerate(sorted(assume, key=str)):  # le(smaller size, larger size)
        small, large = map(_symbol, fact.args)
        base[large] = small + sympy.Symbol(f"_more{i}")
    poly = sympy.expand(poly.subs(base))
    steps = {s: 1 + sympy.Symbol(f"_t{s.name}") for s in poly.free_symbols
             if not s.name.startswith("_")}
    poly = sympy.expand(poly.subs(steps))
    terms = poly.as_coefficients_dict()
    constant = terms.pop(sympy.Integer(1), 0)
    return int(constant) if all(c >= 0 for c in terms.values()) else None


# -- proofs -----------------------------------------------------------------------------------
def prove(e: Expr, assume: Iterable[Expr] = ()) -> bool | None:
    """True or False where the bool `e` is so for all indices and sizes, else None.

    assume: facts of the form `size(a) <= size(b)`.
    """
    known = frozenset(assume)
    for fact in known:
        if fact.op != "le" or {a.op for a in fact.args} != {"size"}:
            raise ValueError(f"assume must hold facts size <= size, got {fact}")
    return _prove(e, known)


@functools.lru_cache(maxsize=8192)
def _prove(e: Expr, assume: frozenset[Expr]) -> bool | None:
    if e.op == "const":
        return bool(e.value)
    if e in assume:
        return True
    if e.op == "not":
        inner = _prove(e.args[0], assume)
        return None if inner is None else not inner
    if e.op in ("and", "or"):
        sides = [_prove(a, assume) for a in e.args]
        decisive = e.op == "or"
        if decisive in sides:
            return decisive
        return None if None in sides else not decisive
    if e.op == "where" and e.dtype == E.BOOL:
        condition = _prove(e.args[0], assume)
        if condition is not None:
            return _prove(e.args[1] if condition else e.args[2], assume)
        yes, no = (_prove(a, assume) for a in e.args[1:])
        return yes if yes is no else None
    if e.op in _COMPARE and e.args[0].dtype == E.INT:
        return _compare(e.op, e.args[0], e.args[1], assume)
    return None


def _compare(op: str, a: Expr, b: Expr, assume: frozenset[Expr]) -> bool | None:
    def never_below(x: Expr, bound: int) -> bool:
        lows = [_at_least(c, assume) for c in _choices(x)]
        return all(low is not None and low >= bound for low in lows)

    if op in ("lt", "le"):
        strict = op == "lt"
        if never_below(b - a, int(strict)):
            return True
        return False if never_below(a - b, int(not strict)) else None
    if simplify_int(a - b) is E.const(0):
        return op == "eq"
    if never_below(a - b, 1) or never_below(b - a, 1):
        return op == "ne"
    return None
