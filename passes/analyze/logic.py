"""Truth values and case distinctions over canonical integers.

`Logic` builds bool expressions in negation normal form: comparisons of integers are one canonical
`le` or `eq` each, a conjunction holds no literal that another one implies, and what is decided by
the ranges of the indices is a constant. A number that depends on a condition is a tree of `where`
with plain leaves, through which operations are pushed (`spread`), so that
`(1 - tril(ones)) * -inf` becomes `where(k <= q, nan, -inf)` and not a product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.passes.analyze.integers import Integers
from attnopt.passes.analyze.polynomials import Poly

TRUE, FALSE = E.TRUE, E.FALSE
_ZERO = E.const(0)
_CASES = 64
_LITERALS = 24
_MIRROR = {"ge": "le", "gt": "lt"}


class Logic(Integers):
    """Canonical bool expressions and case trees of one site."""

    def __init__(self, lengths: Mapping[str, int | torch.SymInt]) -> None:
        self._negated: dict[Expr, Expr] = {}
        self._signs: dict[Expr, Expr] = {}
        super().__init__(lengths)

    # -- connectives ------------------------------------------------------------------------
    def negate(self, e: Expr) -> Expr:
        found = self._negated.get(e)
        if found is None:
            found = self._negated[e] = self._negate(e)
        return found

    def _negate(self, e: Expr) -> Expr:
        match e.op:
            case "const":
                return E.const(not e.value)
            case "not":
                return e.args[0]
            case "and":
                return _chain("or", [self.negate(x) for x in literals(e, "and")])
            case "or":
                return _chain("and", [self.negate(x) for x in literals(e, "or")])
            case "le" if e.args[0].dtype == E.INT:
                return self.at_least_zero(self.sub(self.sub(e.args[0], e.args[1]), E.const(1)))
            case "eq" | "ne":
                return E.call("ne" if e.op == "eq" else "eq", *e.args)
        return E.call("not", e)

    def conj(self, *parts: Expr) -> Expr:
        """All of `parts`, without what follows from the rest."""
        kept: list[Expr] = []
        for part in parts:
            for literal in literals(part, "and"):
                if literal is FALSE or self.negate(literal) in kept:
                    return FALSE
                if literal is not TRUE and literal not in kept:
                    kept.append(literal)
        if len(kept) > _LITERALS:
            return _chain("and", kept)
        for i, e in enumerate(kept):
            if e.op == "or":
                others = kept[:i] + kept[i + 1 :]
                open_cases = [x for x in literals(e, "or") if self.negate(x) not in others]
                if any(x in others for x in open_cases):
                    return self.conj(*others)
                if len(open_cases) < len(literals(e, "or")):
                    return self.conj(*kept[:i], _chain("or", open_cases), *kept[i + 1 :])
        ordered = [e for e in kept if _linear(e)]
        for e in ordered:
            for other in ordered:
                if e is other:
                    continue
                if self.nonneg(self.sub(_slack(other), _slack(e))):  # e implies other
                    return self.conj(*(x for x in kept if x is not other))
                if self.nonneg(self.sub(E.const(-1), self.add(_slack(e), _slack(other)))):
                    return FALSE
        return _chain("and", kept)

    def disj(self, *parts: Expr) -> Expr:
        """Any of `parts`; the dual of `conj`, with what all parts share taken out."""
        parts = tuple(p for p in parts if p is not FALSE)
        if TRUE in parts:
            return TRUE
        if len(parts) > 1:
            shared = [x for x in literals(parts[0], "and")
                      if all(x in literals(p, "and") for p in parts[1:])]
            if shared:
                rest = [_chain("and", [x for x in literals(p, "and") if x not in shared])
                        for p in parts]
                return self.conj(*shared, self.disj(*rest))
        return self.negate(self.conj(*map(self.negate, parts)))

    def choose(self, condition: Expr, yes: Expr, no: Expr) -> Expr:
        """`yes` where the condition holds, else `no`; bool results become connectives."""
        if condition.op == "const":
            return yes if condition.value else no
        if yes is no:
            return yes
        if yes.dtype == E.BOOL:
            return self._choose_bool(condition, yes, no)
        yes, no = self.under(yes, condition), self.under(no, self.negate(condition))
        if yes is no:
            return yes
        if yes.op == "where" and no in yes.args[1:]:
            inner, first, second = yes.args
            if second is no:
                return self.choose(self.conj(condition, inner), first, no)
            return self.choose(self.conj(condition, self.negate(inner)), second, no)
        if no.op == "where" and yes in no.args[1:]:
            inner, first, second = no.args
            if first is yes:
                return self.choose(self.disj(condition, inner), yes, second)
            return self.choose(self.disj(condition, self.negate(inner)), yes, first)
        if condition.op in ("not", "ne", "or"):  # one of two equal forms
            return E.where(self.negate(condition), no, yes)
        return E.where(condition, yes, no)

    def _choose_bool(self, c: Expr, yes: Expr, no: Expr) -> Expr:
        if yes.op == "const":
            return self.disj(c, no) if yes.value else self.conj(self.negate(c), no)
        if no.op == "const":
            return self.disj(self.negate(c), yes) if no.value else self.conj(c, yes)
        return self.disj(self.conj(c, yes), self.conj(self.negate(c), no))

    def under(self, e: Expr, condition: Expr) -> Expr:
        """A case tree where `condition` holds."""
        if e.op != "where":
            return e
        inner, yes, no = e.args
        if inner is condition:
            return self.under(yes, condition)
        if inner is self.negate(condition):
            return self.under(no, condition)
        changed = self.under(yes, condition), self.under(no, condition)
        return e if changed == (yes, no) else self.choose(inner, *changed)

    def spread(self, fn: Callable[..., Expr], *operands: Expr) -> Expr:
        """fn(*operands), applied to the leaves of operands that are case trees.

        Raises LookupError when there would be too many cases.
        """
        if math.prod(_cases(o) for o in operands) > _CASES:
            raise LookupError("too many cases")
        return self._spread(fn, operands)

    def _spread(self, fn: Callable[..., Expr], operands: Sequence[Expr]) -> Expr:
        for o in operands:
            if o.op == "where":
                condition, other = o.args[0], self.negate(o.args[0])
                return self.choose(
                    condition, self._spread(fn, [self.under(x, condition) for x in operands]),
                    self._spread(fn, [self.under(x, other) for x in operands]))
        return fn(*operands)

    def canonical(self, e: Expr) -> Expr:
        """Any Expr of the site in canonical form."""
        done: dict[Expr, Expr] = {}
        for n in e.walk():
            done[n] = self._canonical(n, [done[a] for a in n.args])
        return done[e]

    def _canonical(self, n: Expr, args: list[Expr]) -> Expr:
        match n.op:
            case "size":
                return self.lengths.get(n.value, n)
            case "index" if self.lengths.get(n.value) is E.const(1):
                return _ZERO
            case "and" | "or":
                return (self.conj if n.op == "and" else self.disj)(*args)
            case "not":
                return self.negate(args[0])
            case "where":
                return self.choose(*args)
            case "lt" | "le" | "eq" | "ne":
                return self.compare(n.op, *args)
            case "add" | "sub" | "mul" | "neg" | "floordiv" | "mod" | "minimum" | "maximum" \
                    | "abs" if n.dtype == E.INT and all(a.op != "where" for a in args):
                return getattr(self, n.op)(*args)  # type: ignore[no-any-return]
        return n if tuple(args) == n.args else E.rebuild(n, tuple(args))

    # -- comparisons ------------------------------------------------------------------------
    def compare(self, op: str, a: Expr, b: Expr) -> Expr:
        """`a op b` of two numbers or truth values of one type; op: le, lt, ge, gt, eq, ne."""
        return self.spread(lambda x, y: self._compare(op, x, y), a, b)

    def _compare(self, op: str, a: Expr, b: Expr) -> Expr:
        if op in _MIRROR:
            return self._compare(_MIRROR[op], b, a)
        if E.BOOL in (a.dtype, b.dtype):
            same = self._choose_bool(a, b, self.negate(b))
            match op:
                case "eq" | "ne":
                    return same if op == "eq" else self.negate(same)
                case "le":
                    return self.disj(self.negate(a), b)
            return self.conj(self.negate(a), b)
        if E.FLOAT in (a.dtype, b.dtype):
            whole = self._whole_numbers(op, a, b)
            if whole is None:
                return E.call(op, a, b)
            if isinstance(whole, Expr):
                return whole
            op, a, b = whole
        difference = self.sub(b, a)
        match op:
            case "le":
                return self.at_least_zero(difference)
            case "lt":
                return self.at_least_zero(self.sub(difference, E.const(1)))
            case "eq":
                return self.is_zero(difference)
        return self.negate(self.is_zero(difference))

    def _whole_numbers(self, op: str, a: Expr, b: Expr) -> tuple[str, Expr, Expr] | Expr | None:
        """The comparison of two floats as one of integers, where both are whole or constant."""
        if a.op == b.op == "const":
            return E.call(op, a, b)
        if a.op == "float" and b.op == "float":
            x, y = a.args[0], b.args[0]
            return (op, x, y) if x.dtype == y.dtype == E.INT else None
        flipped = a.op == "const"
        number, c = (b, a.value) if flipped else (a, b.value)
        if (b if not flipped else a).op != "const" or number.op != "float" \
                or number.args[0].dtype != E.INT:
            return None
        if math.isnan(c):
            return E.const(op == "ne")
        if math.isinf(c):
            below = (c > 0) != flipped  # the left side is the smaller one
            return E.const(below if op in ("le", "lt") else op == "ne")
        if op in ("eq", "ne") and c != int(c):
            return E.const(op == "ne")
        if c != int(c):  # i < 3.5 is i <= 3, and 3.5 < i is 4 <= i
            op, c = "le", math.ceil(c) if flipped else math.floor(c)
        left, right = E.const(int(c)), number.args[0]
        return (op, left, right) if flipped else (op, right, left)

    def at_least_zero(self, e: Expr) -> Expr:
        """e >= 0, as a constant or one canonical comparison or a connective of such."""
        found = self._signs.get(e)
        if found is None:
            found = self._signs[e] = self._at_least_zero(e)
        return found

    def _at_least_zero(self, e: Expr) -> Expr:
        if self.nonneg(e):
            return TRUE
        if self.nonneg(self.sub(E.const(-1), e)):
            return FALSE
        p = self.poly(e)
        for atom in sorted({a for m in p for a in m}, key=str):
            alone = p.get((atom,), 0)
            if not alone or sum(atom in m for m in p) != 1:
                continue
            def at(value: Expr, atom: Expr = atom, alone: int = alone) -> Expr:
                return self.at_least_zero(self.sum((
                    self.sub(e, self.mul(atom, E.const(alone))),
                    self.mul(value, E.const(alone)))))
            split = self._split_case(atom, alone, p, at)
            if split is not None:
                return split
        divisor = math.gcd(*(c for m, c in p.items() if m))
        if divisor > 1:
            p = {m: c // divisor for m, c in p.items()}  # floors the constant
        plus, minus = self.halves({m: c for m, c in p.items() if c})
        return E.call("le", minus, plus)

    def _split_case(self, atom: Expr, c: int, p: Poly, at: Callable[[Expr], Expr]) -> Expr | None:
        """`p >= 0` with |x|, min, max, where or x // n in it, by cases that are simpler."""
        match atom.op:
            case "where":
                return self.choose(atom.args[0], at(atom.args[1]), at(atom.args[2]))
            case "abs":
                sides = at(atom.args[0]), at(self.neg(atom.args[0]))
                return self.disj(*sides) if c > 0 else self.conj(*sides)
            case "minimum" | "maximum":
                sides = at(atom.args[0]), at(atom.args[1])
                if (atom.op == "minimum") == (c > 0):
                    return self.conj(*sides)
                if any(s.op == "const" for s in sides):
                    return self.disj(*sides)
            case "floordiv" if c in (1, -1) and atom.args[1].op == "const" and not any(
                    x.op == "floordiv" for m in p for a in m if a is not atom
                    for x in a.walk()):
                x, n = atom.args
                rest = self.build({m: k for m, k in p.items() if m != (atom,)})
                whole = self.mul(rest, n)  # x // n + r >= 0 is x + n r >= 0
                if c > 0:
                    return self.at_least_zero(self.add(x, whole))
                return self.at_least_zero(self.sum((whole, self.neg(x), n, E.const(-1))))
        return None

    def is_zero(self, e: Expr) -> Expr:
        """e == 0, as a constant or one canonical equation."""
        p = self.poly(e)
        if self.nonneg(e) and self.nonneg(self.neg(e)):
            return TRUE
        if self.nonneg(self.sub(e, E.const(1))) or self.nonneg(self.sub(E.const(-1), e)):
            return FALSE
        for atom in {a for m in p for a in m if a.op == "where"}:
            condition, yes, no = atom.args
            sides = [self.is_zero(e.replace({atom: x})) for x in (yes, no)]
            return self.choose(condition, *sides)
        if len(p) == 1:  # a product is zero where a factor is
            (monomial,) = p
            if len(monomial) > 1:
                return self.disj(*map(self.is_zero, monomial))
        divisor = math.gcd(*(c for m, c in p.items() if m))
        if p.get((), 0) % divisor:
            return FALSE
        p = {m: c // divisor for m, c in p.items()}
        plus, minus = self.halves(p)
        if plus.op == "const" or minus.op != "const" and str(minus) < str(plus):
            plus, minus = minus, plus
        return E.call("eq", plus, minus)


def literals(e: Expr, op: str) -> list[Expr]:
    """The operands of a nested `and` or `or`, in order."""
    if e.op != op:
        return [e]
    return [x for a in e.args for x in literals(a, op)]


def leaves_of(e: Expr) -> list[Expr]:
    """The distinct leaves of a case tree."""
    if e.op != "where":
        return [e]
    return list(dict.fromkeys([*leaves_of(e.args[1]), *leaves_of(e.args[2])]))


def _cases(e: Expr) -> int:
    return _cases(e.args[1]) + _cases(e.args[2]) if e.op == "where" else 1


def _chain(op: str, parts: Sequence[Expr]) -> Expr:
    total = E.const(op == "and")
    for p in parts:
        total = E.call(op, total, p)
    return total


def _linear(e: Expr) -> bool:
    return e.op == "le" and e.args[0].dtype == E.INT


def _slack(e: Expr) -> Expr:
    return e.args[1] - e.args[0]
