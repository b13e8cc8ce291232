"""Lifting rules of arithmetic: sums, products, quotients, extremes and powers of whole numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.passes.analyze.lift import Bound, Index, Lifter, Unliftable
from attnopt.passes.analyze.lift_types import (
    as_type,
    cast,
    dtype_of,
    pointwise,
    truth,
    typed_leaf,
    whole_number,
)
from attnopt.passes.normalize import is_tensor, op_name

_ZERO = E.const(0)


def arithmetic(fn: Callable[..., Expr], neutral: int | None = None,
               logical: Callable[..., Expr] | None = None) -> Callable[..., Expr]:
    """A rule for a binary op: `fn` on whole numbers, `logical` where the result is a truth value,
    and x itself where the second operand is `neutral`."""
    def rule(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
        to, pair = dtype_of(node), (a.self, a.other)
        alpha = a.values.get("alpha", 1)
        if to == torch.bool:
            if logical is None:
                raise Unliftable("arithmetic of truth values")
            return logical(lift.logic, *(truth(lift, lift.operand(x, idx)) for x in pair))

        def leaf(x: Expr, y: Expr) -> Expr:
            x, y = (typed_leaf(lift, e, t, to) for e, t in zip((x, y), pair, strict=True))
            if alpha != 1:
                raise Unliftable("a scaled operand")
            if neutral is not None:
                if y.op == "const" and y.value == neutral:
                    return x
                if x.op == "const" and x.value == neutral and op_name(node) in ("add", "mul"):
                    return y
            whole = whole_number(x), whole_number(y)
            if None in whole:
                raise Unliftable(f"{op_name(node)} of fractions")
            return as_type(lift, fn(lift.logic, *whole), to)
        return pointwise(lift, node, idx, leaf, pair)
    return rule


def _reversed_sub(logic: Any, x: Expr, y: Expr) -> Expr:
    return logic.sub(y, x)


def division(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    mode = a.values.get("rounding_mode")
    if op_name(node) == "floor_divide":
        mode = "floor"
    if mode is None:
        return arithmetic(_no_quotient, neutral=1)(lift, node, a, idx)
    exact = _floored if mode == "floor" else _truncated
    if dtype_of(node).is_floating_point:
        raise Unliftable("a rounded quotient of floats")
    return arithmetic(exact)(lift, node, a, idx)


def _no_quotient(logic: Any, x: Expr, y: Expr) -> Expr:
    raise Unliftable("a quotient that is rounded")


def _floored(logic: Any, x: Expr, y: Expr) -> Expr:
    return logic.floordiv(x, y)


def _truncated(logic: Any, x: Expr, y: Expr) -> Expr:
    if not logic.nonneg(x) or not logic.nonneg(y):
        raise Unliftable("a quotient of negative numbers, truncated")
    return logic.floordiv(x, y)


def remainder(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    def leaf(logic: Any, x: Expr, y: Expr) -> Expr:
        if op_name(node) == "fmod" and not (logic.nonneg(x) and logic.nonneg(y)):
            raise Unliftable("a remainder of negative numbers, truncated")
        return logic.mod(x, y)
    return arithmetic(leaf)(lift, node, a, idx)


def extreme(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    """minimum and maximum of two tensors."""
    if not is_tensor(a.values.get("other")):
        raise Unliftable("a reduction")
    least = op_name(node) in ("minimum", "min", "fmin")
    if dtype_of(node) == torch.bool:
        both = [truth(lift, lift.operand(x, idx)) for x in (a.self, a.other)]
        return (lift.logic.conj if least else lift.logic.disj)(*both)
    name = "minimum" if least else "maximum"
    return arithmetic(lambda logic, x, y: getattr(logic, name)(x, y))(lift, node, a, idx)


def clamp(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    """clamp, clamp_min, clamp_max with numbers or tensors as ends."""
    to = dtype_of(node)
    ends = {n: x for n in ("min", "max") if (x := a.values.get(n)) is not None}

    def leaf(x: Expr, *bounds: Expr) -> Expr:
        x = typed_leaf(lift, x, a.self, to)
        for (end, given), bound in zip(ends.items(), bounds, strict=True):
            bound = typed_leaf(lift, bound, given, to)
            if bound.op == "const" and math.isinf(bound.value) \
                    and (bound.value < 0) == (end == "min"):
                continue
            whole, limit = whole_number(x), whole_number(bound)
            if whole is None or limit is None:
                raise Unliftable("clamps fractions")
            pick = lift.logic.maximum if end == "min" else lift.logic.minimum
            x = as_type(lift, pick(whole, limit), to)
        return x
    return pointwise(lift, node, idx, leaf, (a.self, *ends.values()))


def unary(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    """neg, abs, sign, square of whole numbers; floor and round leave them."""
    logic, name = lift.logic, op_name(node)

    def leaf(x: Expr) -> Expr:
        whole = whole_number(x)
        if whole is None:
            raise Unliftable(f"{name} of what varies")
        match name:
            case "neg" | "negative":
                made = logic.neg(whole)
            case "abs" | "absolute":
                made = logic.abs(whole)
            case "square":
                made = logic.mul(whole, whole)
            case "sign":
                positive = logic.compare("lt", _ZERO, whole)
                below = logic.choose(logic.compare("eq", whole, _ZERO), _ZERO, E.const(-1))
                return cast(lift, logic.choose(positive, E.const(1), below), torch.int64,
                            dtype_of(node))
            case _:
                made = whole
        return as_type(lift, made, dtype_of(node))
    return pointwise(lift, node, idx, leaf)


def power(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    if a.values.get("exponent") not in (1, 2) or not is_tensor(a.values.get("self")):
        return pointwise(lift, node, idx)

    def leaf(x: Expr) -> Expr:
        whole = whole_number(x)
        if whole is None:
            raise Unliftable("a power of what varies")
        return as_type(lift, whole if a.exponent == 1 else lift.logic.mul(whole, whole),
                   dtype_of(node))
    return pointwise(lift, node, idx, leaf)


ARITHMETIC = {
    **dict.fromkeys(("div", "true_divide", "divide", "floor_divide"), division),
    **dict.fromkeys(("remainder", "fmod"), remainder),
    **dict.fromkeys(("minimum", "maximum", "min", "max", "fmin", "fmax"), extreme),
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max", "clip"), clamp),
    **dict.fromkeys(("neg", "negative", "abs", "absolute", "sign", "square", "floor", "round",
                     "ceil", "trunc"), unary),
    **dict.fromkeys(("add", "__add__"), arithmetic(
        lambda logic, x, y: logic.add(x, y), 0, lambda logic, x, y: logic.disj(x, y))),
    **dict.fromkeys(("mul", "multiply"), arithmetic(
        lambda logic, x, y: logic.mul(x, y), 1, lambda logic, x, y: logic.conj(x, y))),
    **dict.fromkeys(("sub", "subtract"), arithmetic(lambda logic, x, y: logic.sub(x, y), 0)),
    "rsub": arithmetic(_reversed_sub), "pow": power,
}
