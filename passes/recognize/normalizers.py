"""Normalisers written out by hand: what an expression over raw scores does to a row.

Given the weights as an Expr of the score and of row reductions, find the normaliser:

    exp(x - max x) / sum exp(x - max x)      softmax, with or without the maximum
    exp(x - logsumexp x)                     softmax
    exp(x) / (sum exp(x) + d)                softmax with a sink, or scaled: `denominators`
    f(x) / sum f(x)                          f with `l1`, f one of sigmoid, relu, softplus, exp
    g(f(x))                                  f alone, g the epilogue on the weights

A shift that is constant along the keys (a maximum, of the row or of more) leaves softmax as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.passes.recognize.denominators import Denominator, behind_softplus, with_term
from attnopt.passes.recognize.reader import MAXIMA, Marker
from attnopt.rules import Decline

FUNCTIONS = ("exp", "sigmoid", "relu", "softplus")


@dataclass
class Normalizer:
    """robust: a row of nothing but one low number is uniform, as softmax itself makes it. Written
    by hand without subtracting the maximum it is not: exp underflows, or lse swallows log n.
    sink: a logit per row that takes part and has no value."""

    name: str
    l1: bool
    logits: Expr
    weights: Expr
    robust: bool = True
    sink: Expr | None = None


def contains_score(e: Expr) -> bool:
    return any(leaf.op == "score" for leaf in e.leaves)


def drop_shift(e: Expr, markers: Mapping[Expr, Marker]) -> Expr:
    """`a - c * max(a)` is `a` to softmax, times or divided by a number as well; nested too.

    The maximum must be of `a` itself, or of a positive multiple of it: then a row in which it is
    not finite is NaN with the shift and without. Other shifts are left alone.
    """
    if e.op in ("sub", "add"):
        left, right = e.args
        swapped = 1 if e.op == "add" else -1
        for a, shift, sign in ((left, right, 1), (right, left, swapped)):
            marker = markers.get(_core(shift, signed=False))
            if marker is None or marker.kind not in MAXIMA:
                continue
            bare = drop_shift(a, markers)
            if _core(drop_shift(marker.of, markers)) is _core(bare):
                return bare if sign == 1 else E.call("mul", bare, -1.0)
    elif _scaled(e) is not None:
        a = _multiplied(e)
        bare = drop_shift(a, markers)
        if bare is not a:
            if bare.op == "div" and e.op == "mul" and bare.args[1] is _scaled(e):
                return bare.args[0]  # scores / c before the shift, times c after it
            return e.replace({a: bare})
    return e


def _scaled(e: Expr) -> Expr | None:
    """The number that `e` is multiplied with or divided by, if that is what it is."""
    factors = e.args[::-1] if e.op == "mul" else e.args[1:] if e.op == "div" else ()
    for factor in factors:
        if factor.op == "const" and factor.value and math.isfinite(factor.value):
            return factor
    return None


def _multiplied(e: Expr) -> Expr:
    return e.args[1] if e.args[0] is _scaled(e) else e.args[0]


def _core(e: Expr, *, signed: bool = True) -> Expr:
    """`e` without the numbers that it is multiplied with; only positive ones if `signed`."""
    while (factor := _scaled(e)) is not None and (factor.value > 0 or not signed):
        e = _multiplied(e)
    return e


def _largest_is_zero(e: Expr, markers: Mapping[Expr, Marker]) -> bool:
    """Is `e` x - max(x), row by row, or that times a positive number?"""
    factor = _scaled(e)
    if factor is not None:
        return factor.value > 0 and _largest_is_zero(_multiplied(e), markers)
    if e.op != "sub":
        return False
    marker = markers.get(e.args[1])
    return marker is not None and marker.kind in ("amax", "max") and (
        drop_shift(marker.of, markers) is drop_shift(e.args[0], markers))


def row_free(e: Expr, markers: Mapping[Expr, Marker]) -> Expr:
    """`e` without softmax-neutral shifts; declines where another reduction remains."""
    e = drop_shift(e, markers)
    left = [leaf for leaf in e.leaves if leaf in markers]
    if left:
        marker = markers[left[0]]
        what = "maximum over several rows" if marker.kind == "peak" else f"row {marker.kind}"
        raise Decline(f"a {what} enters the logits", marker.node)
    return e


def by_hand(e: Expr, markers: Mapping[Expr, Marker]) -> Normalizer:
    """Find the normaliser in the weights `e`, an expression over `score` and markers."""
    found = _as_softmax(e, markers)
    if found is not None:
        return found
    sites = [n for n in e.walk() if _is_softmax_like(n, markers)]
    if sites:
        inner = _as_softmax(sites[-1], markers)
        assert inner is not None
        return _wrapped(e, sites[-1], inner, markers)
    for node in reversed(list(e.walk())):  # outermost first
        if node.op in FUNCTIONS and contains_score(node):
            rest = e.replace({node: E.weight})
            if not contains_score(rest):
                return _with_sum(node, rest, markers)
    return Normalizer("identity", False, row_free(e, markers), E.weight)


def _is_softmax_like(n: Expr, markers: Mapping[Expr, Marker]) -> bool:
    try:
        return _as_softmax(n, markers) is not None
    except Decline:
        return False


def _as_softmax(e: Expr, markers: Mapping[Expr, Marker]) -> Normalizer | None:
    if e.op == "exp" and e.args[0].op == "sub":
        x, shift = e.args[0].args
        marker = markers.get(shift)
        if marker is not None and marker.kind == "logsumexp" and marker.of is x:
            return Normalizer("softmax", False, row_free(x, markers), E.weight, robust=False)
        more = behind_softplus(x, shift, markers)
        if more is not None:
            return _with_term(more, markers)
    if e.op == "div":
        top, bottom = e.args
        if top.op == "exp" and bottom.op == "add":
            for one, term in (bottom.args, bottom.args[::-1]):
                marker = markers.get(one)
                if marker is not None and marker.kind == "sum" and marker.of is top:
                    return _with_term(with_term(top.args[0], term, markers), markers)
        marker = markers.get(bottom)
        if marker is not None and marker.kind == "sum" and marker.of is top:
            if top.op == "exp":
                logits = row_free(top.args[0], markers)
                return Normalizer("softmax", False, logits, E.weight,
                                  robust=_largest_is_zero(top.args[0], markers))
            if not any(n.op in FUNCTIONS for n in top.walk()):
                return Normalizer("identity", True, row_free(top, markers), E.weight)
            if top.op in FUNCTIONS:
                return Normalizer(top.op, True, row_free(top.args[0], markers), E.weight)
    return None


def _with_term(found: Denominator, markers: Mapping[Expr, Marker]) -> Normalizer:
    weights = E.weight if found.factor is None else E.call("mul", E.weight, found.factor)
    return Normalizer("softmax", False, row_free(found.logits, markers), weights,
                      robust=found.factor is None, sink=found.sink)


def _wrapped(e: Expr, site: Expr, inner: Normalizer, markers: Mapping[Expr, Marker]) -> Normalizer:
    rest = e.replace({site: E.weight})
    if contains_score(rest) or any(leaf in markers for leaf in rest.leaves):
        raise Decline("the scores are used beside their softmax")
    rest = rest.replace({E.weight: inner.weights})
    return Normalizer(inner.name, inner.l1, inner.logits, rest, inner.robust, inner.sink)


def _with_sum(node: Expr, rest: Expr, markers: Mapping[Expr, Marker]) -> Normalizer:
    """g(f(x), sum f(x)): the sum becomes a row statistic of the normaliser."""
    mapping: dict[Expr, Expr] = {}
    for leaf in rest.leaves:
        marker = markers.get(leaf)
        if marker is not None:
            if marker.kind != "sum" or marker.of is not node:
                raise Decline(f"a row {marker.kind} enters the weights", marker.node)
            mapping[leaf] = E.stat("sum")
    return Normalizer(node.op, False, row_free_function(node, markers), rest.replace(mapping))


def row_free_function(node: Expr, markers: Mapping[Expr, Marker]) -> Expr:
    """The logits of a function that is not shift-invariant: no shift may be dropped."""
    logits = node.args[0]
    left = [leaf for leaf in logits.leaves if leaf in markers]
    if left:
        marker = markers[left[0]]
        raise Decline(f"a row {marker.kind} enters unnormalised weights", marker.node)
    return logits
