"""A pattern's term compared with what a model computes: the same but for spelling?

Sums and products are compared as sets of any order, as deeply opened on the model's side as the
pattern asks for, so that an argument of the pattern may stand for whatever tensor there is. A term
equals the model's up to a number, which goes through everything that is linear: so a scale may sit
anywhere. At the end it must be 1; numbers are alike within 1e-6 of each other.

Axes are not compared here. Every argument that is met, and every reduction, is noted with the axes
of both sides; `attnopt.passes.subgraphs.binding` finds out which axis is which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from attnopt.passes.normalize import op_name
from attnopt.passes.recognize.axes import Axis, Layout
from attnopt.passes.subgraphs.terms import (
    COMMUTATIVE,
    Constant,
    Item,
    Ref,
    Term,
    expand,
    strip,
)

#: cuts of one sum or product of the model that are looked at
_MOST_CUTS = 64
#: of a sum (coefficient, item), of a product (exponent, item)
Entries = tuple[tuple[float, Item], ...]


@dataclass(frozen=True)
class State:
    """What was found so far: arguments by name, where they were met, and what is reduced."""

    bound: Mapping[str, fx.Node] = field(default_factory=dict)
    met: tuple[tuple[str, Layout, Layout], ...] = ()
    reduced: tuple[tuple[tuple[Axis, ...], tuple[Axis, ...]], ...] = ()
    terms: int = 0


#: (state, by which number the model's term is a multiple of the pattern's; None for any)
Found = Iterator[tuple[State, float | None]]


def alike(a: float, b: float) -> bool:
    return a == b or math.isclose(a, b, rel_tol=1e-6)


class Matcher:
    """Compares terms of one pattern with nodes of one model.

    names: the pattern's arguments by their nodes; loose: numbers need not agree
    nearest: how far the best attempt came, and what stopped it
    """

    def __init__(self, names: Mapping[fx.Node, str], own: Constant, model: Constant,
                 loose: bool = False) -> None:
        self.names, self.own, self.model, self.loose = names, own, model, loose
        self.nearest: tuple[int, str, fx.Node | None] = (0, "", None)

    def roots(self, pattern: Item, model: Item, state: State) -> Iterator[State]:
        """States in which the two are equal."""
        for found, ratio in self.match(pattern, model, state):
            if ratio is None or self.loose or alike(ratio, 1.0):
                yield found
            else:
                self.stop(found, f"it is {ratio:.6g} times what its pattern computes", model)

    def stop(self, state: State, reason: str, at: Item | None = None) -> None:
        if state.terms > self.nearest[0]:
            self.nearest = (state.terms, reason, at.node if isinstance(at, Ref) else None)

    # -- one term -----------------------------------------------------------------------------
    def match(self, pattern: Item, model: Item, state: State) -> Found:
        entries, rest = _flat(pattern, self.own, _open_sum)
        if (len(entries) > 1 or entries and rest) and all(c for c, _ in entries):
            yield from self.sums(entries, rest, model, state)
            return
        if not entries or any(c == 0 for c, _ in entries):
            yield from self.numbers(rest, model, state)
            return
        (scale, item), = entries
        powers, factor = _flat(item, self.own, _open_product)
        factor *= scale
        if not powers or factor == 0:
            yield from self.numbers(factor, model, state)
        elif len(powers) > 1 or powers[0][0] != 1:
            yield from self.products(powers, factor, model, state)
        else:
            for found, ratio in self.plain(powers[0][1], model, state):
                yield found, None if ratio is None else ratio / factor

    def numbers(self, value: Any, model: Item, state: State) -> Found:
        found = expand(model, self.model)
        if not isinstance(found, Term) or found.op != "number":
            (entries, rest) = _flat(model, self.model, _open_sum)
            if entries:
                self.stop(state, f"its pattern has the number {value:.6g} there", model)
                return
            found = Term("number", value=rest)
        other = found.value
        if isinstance(value, bool) or isinstance(other, bool) or value == 0 or not (
                math.isfinite(value) and math.isfinite(other)):
            if value == other or self.loose or value != value and other != other:
                # Any multiple of 0 is 0. Of inf, a positive one only: it must be just as it is.
                yield state, None if value == 0 and not isinstance(value, bool) else 1.0
            else:
                self.stop(state, f"the number {other:.6g}, its pattern has {value:.6g}", model)
            return
        yield state, other / value

    def plain(self, pattern: Item, model: Item, state: State) -> Found:
        """Anything but a sum, a product or a number."""
        own = expand(pattern, self.own)
        if isinstance(own, Ref):
            yield from self.argument(own, model, state)
            return
        scale = 1.0
        other = expand(model, self.model)
        while (alone := _scaled(other, self.model)) is not None:
            factor, model = alone
            scale, other = scale * factor, expand(model, self.model)
        if not isinstance(other, Term) or (own.op, own.value, len(own.args)) != (
                other.op, other.value, len(other.args)):
            got = other.op if isinstance(other, Term) else op_name(other.node)
            self.stop(state, f"{got}, its pattern has {own.op}", model)
            return
        seen = State(state.bound, state.met, state.reduced, state.terms + 1)
        if own.axes or other.axes:
            seen = State(seen.bound, seen.met, (*seen.reduced, (own.axes, other.axes)), seen.terms)
        for found, ratio in self.operation(own, other, seen):
            yield found, None if ratio is None else scale * ratio

    def operation(self, own: Term, other: Term, state: State) -> Found:
        if own.op == "reduce" and own.value in ("sum", "mean"):
            yield from self.match(own.args[0], other.args[0], state)
            return
        if own.op == "where":
            yield from self.where(own, other, state)
            return
        orders: list[Sequence[Item]] = [other.args]
        if own.op in COMMUTATIVE:
            orders.append(other.args[::-1])
        for args in orders:
            for found in self.all(own.args, args, state):
                yield found, 1.0

    def all(self, own: Sequence[Item], others: Sequence[Item], state: State) -> Iterator[State]:
        """Every argument equal to its own."""
        if not own:
            yield state
            return
        for found in self.roots(own[0], others[0], state):
            yield from self.all(own[1:], others[1:], found)

    def where(self, own: Term, other: Term, state: State) -> Found:
        (mine, *branches), (theirs, *others) = (
            _condition(t, c) for t, c in ((own, self.own), (other, self.model)))
        for seen in self.roots(mine, theirs, state):
            for first, one in self.match(branches[0], others[0], seen):
                for second, two in self.match(branches[1], others[1], first):
                    if one is None or two is None or self.loose or alike(one, two):
                        yield second, two if one is None else one

    def argument(self, own: Ref, model: Item, state: State) -> Found:
        name = self.names.get(own.node)
        if name is None or not isinstance(model, Ref):
            self.stop(state, "a part of a fused operation", model)
            return
        found = strip(model)
        if state.bound.get(name, found.node) is not found.node:
            self.stop(state, f"{name} of its pattern is {state.bound[name].name} and "
                      f"{found.node.name}", model)
            return
        yield State({**state.bound, name: found.node},
                    (*state.met, (name, own.layout, found.layout)), state.reduced,
                    state.terms + 1), 1.0

    # -- sums and products ----------------------------------------------------------------------
    def sums(self, entries: Entries, constant: float, model: Item, state: State) -> Found:
        start: Entries = ((1.0, model),)
        for cut, rest in _cuts(start, 0.0, self.model, _open_sum, len(entries)):
            for found, ratio in self.terms_of_sum(entries, cut, state, None):
                if ratio is None or self.loose or (
                        rest == 0 if constant == 0 else alike(rest, ratio * constant)):
                    yield found, ratio
                else:
                    self.stop(found, f"the number {rest / (ratio or 1):.6g}, its pattern has "
                              f"{constant:.6g}", model)

    def terms_of_sum(self, entries: Entries, cut: Entries, state: State, known: float | None
                     ) -> Found:
        if not entries:
            yield state, known
            return
        (coefficient, item), *rest = entries
        for i, (other, candidate) in enumerate(cut):
            for found, ratio in self.match(item, candidate, state):
                whole = None if ratio is None else other * ratio / coefficient
                if known is None or whole is None or self.loose or alike(known, whole):
                    yield from self.terms_of_sum(tuple(rest), (*cut[:i], *cut[i + 1:]), found,
                                                 whole if known is None else known)
                else:
                    self.stop(found, f"a factor {whole:.6g} where another is {known:.6g}",
                              candidate)

    def products(self, powers: Entries, factor: float, model: Item, state: State) -> Found:
        start: Entries = ((1.0, model),)
        for cut, rest in _cuts(start, 1.0, self.model, _open_product, len(powers)):
            yield from self.factors(powers, cut, state, rest / factor)

    def factors(self, powers: Entries, cut: Entries, state: State, ratio: float | None) -> Found:
        if not powers:
            yield state, ratio
            return
        (exponent, item), *rest = powers
        for i, (other, candidate) in enumerate(cut):
            if exponent != other:
                continue
            for found, part in self.match(item, candidate, state):
                if part is not None and (part == 0 or part < 0 and exponent != int(exponent)):
                    continue
                whole = None if ratio is None or part is None else ratio * part ** exponent
                yield from self.factors(tuple(rest), (*cut[:i], *cut[i + 1:]), found, whole)


def _condition(term: Term, constant: Constant) -> tuple[Item, ...]:
    """(condition, if true, if false) of a `where` whose condition is not negated."""
    condition, *branches = term.args
    while isinstance(found := expand(condition, constant), Term) and found.op == "logical_not":
        condition, branches = found.args[0], branches[::-1]
    return (condition, *branches)


# -- opening ---------------------------------------------------------------------------------------
#: (item, its number, constant) -> (entries, rest) of one step, or None
Opener = Callable[[Item, float, Constant], "tuple[Entries, float] | None"]


def _open_sum(item: Item, coefficient: float, constant: Constant) -> tuple[Entries, float] | None:
    term = expand(item, constant)
    if not isinstance(term, Term):
        return None
    if term.op == "number" and not isinstance(term.value, bool):
        return (), coefficient * term.value
    if term.op == "sum":
        numbers, rest = term.value
        return tuple((coefficient * c, a) for c, a in zip(numbers, term.args, strict=True)), (
            coefficient * rest)
    if term.op == "product":
        powers, factor = _flat_once(term, constant)
        if len(powers) == 1 and powers[0][0] == 1 and factor != 1:
            return ((coefficient * factor, powers[0][1]),), 0.0
    return None


def _flat_once(term: Term, constant: Constant) -> tuple[Entries, float]:
    """Entries of a product, its numbers in the factor."""
    exponents, factor = term.value
    kept = []
    for exponent, item in zip(exponents, term.args, strict=True):
        found = expand(item, constant)
        if isinstance(found, Term) and found.op == "number" and not isinstance(found.value, bool) \
                and (found.value > 0 or exponent == int(exponent) and found.value):
            factor *= float(found.value) ** exponent
        else:
            kept.append((exponent, item))
    return tuple(kept), factor


def _scaled(term: Item, constant: Constant) -> tuple[float, Item] | None:
    """(number, item) of a term that is one item times a number."""
    if not isinstance(term, Term) or term.op not in ("sum", "product"):
        return None
    if term.op == "sum":
        numbers, rest = term.value
        return (numbers[0], term.args[0]) if len(numbers) == 1 and rest == 0 else None
    powers, factor = _flat_once(term, constant)
    return (factor, powers[0][1]) if len(powers) == 1 and powers[0][0] == 1 else None


def _open_product(item: Item, exponent: float, constant: Constant
                  ) -> tuple[Entries, float] | None:
    term = expand(item, constant)
    if not isinstance(term, Term):
        return None
    if term.op == "sum" and len(term.args) == 1 and term.value[1] == 0:
        term = Term("product", term.args, ((1.0,), term.value[0][0]))
    if term.op == "number" and not isinstance(term.value, bool) and (
            term.value > 0 or exponent == int(exponent) and term.value):
        return (), float(term.value) ** exponent
    if term.op != "product" or exponent != int(exponent):
        return None
    powers, factor = _flat_once(term, constant)
    if powers == ((1.0, item),) or factor == 0:
        return None
    if abs(exponent) != 1 and any(e != int(e) for e, _ in powers):
        return None  # the square of a root is not defined everywhere
    return tuple((exponent * e, a) for e, a in powers), factor ** exponent


def _joined(opener: Opener, a: float, b: float) -> float:
    return a + b if opener is _open_sum else a * b


def _merged(opener: Opener, entries: Entries) -> Entries:
    """x * x as x^2: whole powers of one tensor in one, but not x / x, which is not 1 at 0."""
    if opener is _open_sum:
        return entries
    found: list[tuple[float, Item]] = []
    for exponent, item in entries:
        place = strip(item) if isinstance(item, Ref) else item
        for i, (other, known) in enumerate(found):
            twin = place.same(strip(known)) if isinstance(place, Ref) and isinstance(
                known, Ref) else place is known
            if twin and exponent == int(exponent) and other == int(other) and exponent * other > 0:
                found[i] = (exponent + other, known)
                break
        else:
            found.append((exponent, item))
    return tuple((e, i) for e, i in found if e)


def _flat(item: Item, constant: Constant, opener: Opener) -> tuple[Entries, float]:
    """A sum or a product opened as far as it goes: the pattern's side."""
    rest = 0.0 if opener is _open_sum else 1.0
    done: list[tuple[float, Item]] = []
    waiting: list[tuple[float, Item]] = [(1.0, item)]
    while waiting:
        weight, part = waiting.pop(0)
        opened = opener(part, weight, constant)
        if opened is None:
            done.append((weight, part))
        else:
            entries, more = opened
            rest = _joined(opener, rest, more)
            waiting[:0] = entries
    return _merged(opener, tuple(done)), rest


def _cuts(entries: Entries, rest: float, constant: Constant, opener: Opener, wanted: int
          ) -> Iterator[tuple[Entries, float]]:
    """The ways to open a sum or a product into so many parts: the model's side."""
    left = _MOST_CUTS

    def open_from(entries: Entries, rest: float, start: int) -> Iterator[tuple[Entries, float]]:
        nonlocal left
        left -= 1
        if left < 0:
            return
        merged = _merged(opener, entries)
        if len(merged) == wanted:
            yield merged, rest
        if len(entries) > 2 * wanted + 2:
            return
        for i in range(start, len(entries)):
            weight, part = entries[i]
            opened = opener(part, weight, constant)
            if opened is not None:
                inner, more = opened
                yield from open_from((*entries[:i], *inner, *entries[i + 1:]),
                                     _joined(opener, rest, more), i)

    yield from open_from(entries, rest, 0)
