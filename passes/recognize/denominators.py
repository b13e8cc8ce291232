"""One more term in the denominator of a softmax that is written out: a sink, or a factor on rows.

    exp(x - s) / (sum exp(x - s) + d)  =  softmax of x beside a logit  log d + s  without a value

With d = c * exp(-s) the shift s cancels: the sink is log c, and with c = 1 this is "softmax off by
one", exp(x) / (1 + sum exp(x)). Many write d = 1 (or a small number against division by 0) behind a
shift by the maximum, which is another function: the sink is log d + max x then, and

    softmax(x) * sigmoid(lse - max - log d)

is what it computes. That form holds for a sink that is a number, too, and serves where a row may
have no finite score and a shift by its maximum makes it NaN, which a sink would not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.rules import Decline

if TYPE_CHECKING:
    from attnopt.passes.recognize.reader import Marker

#: operations that make no infinite logit of finite scores
_FINITE = ("score", "const", "index", "size", "add", "sub", "mul", "div", "neg", "tanh", "sigmoid",
           "int", "float")


@dataclass(frozen=True)
class Denominator:
    """The softmax of `logits`, with `sink` beside them or its result scaled by `factor`."""

    logits: Expr
    sink: Expr | None = None
    factor: Expr | None = None


def with_term(x: Expr, term: Expr, markers: Mapping[Expr, Marker]) -> Denominator:
    """What exp(x) / (sum exp(x) + term) is."""
    logits, shift = _shifted(x, markers)
    added = _logarithm(term)
    if shift is None:
        return Denominator(logits, sink=_row(added, markers))
    marker = _maximum(shift, markers, logits)
    rest = _cancelled(added, shift)
    if marker is None:
        raise Decline("a term beside the row sum, behind a shift that is no row maximum")
    if rest is not None:
        rest = _row(rest, markers)
        if shift not in markers or all(n.op in _FINITE and _bounded(n) for n in logits.walk()):
            return Denominator(logits, sink=rest)
        return Denominator(logits, factor=E.call("sigmoid", E.stat("lse") - rest))
    if added.op != "const" or shift not in markers:
        raise Decline("a term beside the row sum that depends on a row maximum", marker.node)
    above = E.stat("lse") - E.stat("max")
    return Denominator(logits, factor=E.call(
        "sigmoid", above if added.value == 0 else above - added))


def behind_softplus(x: Expr, shift: Expr, markers: Mapping[Expr, Marker]) -> Denominator | None:
    """exp(x - softplus(logsumexp x - c) - c): the sink is c."""
    sink = E.const(0.0)
    if shift.op == "add" and shift.args[1].op == "const":
        shift, sink = shift.args
    if shift.op != "softplus":
        return None
    inner = shift.args[0]
    if inner.op == "sub" and inner.args[1] is sink:
        inner = inner.args[0]
    elif sink.value != 0:
        return None
    marker = markers.get(inner)
    if marker is None or marker.kind != "logsumexp" or marker.of is not x:
        return None
    return Denominator(x, sink=sink)


def _shifted(x: Expr, markers: Mapping[Expr, Marker]) -> tuple[Expr, Expr | None]:
    """(a, s) where x is a - s and s is made of reductions along the row."""
    if x.op == "sub" and x.args[1].leaves & markers.keys() and all(
            leaf.op == "const" or leaf in markers for leaf in x.args[1].leaves):
        return x.args[0], x.args[1]
    return x, None


def _maximum(shift: Expr, markers: Mapping[Expr, Marker], logits: Expr) -> Marker | None:
    """The row maximum that a shift is, as it is or no lower than some number."""
    if shift.op in ("relu", "maximum"):
        floor = shift.args[1:]
        if any(f.op != "const" or not math.isfinite(f.value) for f in floor):
            return None
        shift = shift.args[0]
    marker = markers.get(shift)
    known = marker is not None and marker.kind in ("amax", "max") and marker.of is logits
    return marker if known else None


def _logarithm(term: Expr) -> Expr:
    if term.op == "const" and math.isfinite(term.value) and term.value > 0:
        return E.const(math.log(term.value))
    if term.op == "exp":
        return term.args[0]
    if term.op == "mul":
        for factor, other in (term.args, term.args[::-1]):
            if factor.op == "const" and other.op == "exp":
                return E.call("add", other.args[0], _logarithm(factor))
    raise Decline("a term beside the row sum that is no exponential or positive number")


def _cancelled(e: Expr, shift: Expr) -> Expr | None:
    """e + shift, where the shift cancels."""
    if e.op == "sub" and e.args[1] is shift:
        return e.args[0]
    if e.op == "neg" and e.args[0] is shift:
        return E.const(0.0)
    if e.op == "mul" and set(e.args) == {shift, E.const(-1.0)}:
        return E.const(0.0)
    if e.op == "add":
        for a, b in (e.args, e.args[::-1]):
            rest = _cancelled(a, shift)
            if rest is not None:
                return b if rest.op == "const" and rest.value == 0 else E.call("add", rest, b)
    return None


def _row(e: Expr, markers: Mapping[Expr, Marker]) -> Expr:
    """`e`, where it is one number per row that no reduction of the row enters."""
    if e.has("score") or e.leaves & markers.keys() or "k" in e.indices:
        raise Decline("a term beside the row sum that the scores enter")
    return E.call("float", e) if e.dtype != E.FLOAT else e


def _bounded(e: Expr) -> bool:
    if e.op == "div":
        return e.args[1].op == "const" and e.args[1].value != 0
    return e.op != "const" or math.isfinite(e.value)
