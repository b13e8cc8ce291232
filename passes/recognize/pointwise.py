"""Pointwise ATen operations as `Expr`: one table, read by the recogniser and the mask lift.

Each entry takes the node and its arguments as expressions and returns an Expr. Casts between
floating types vanish here; what precision the author computed in is noted by the recogniser.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.passes.normalize import is_tensor, op_name
from attnopt.rules import Decline

Rule = Callable[..., Expr]


def _alpha(op: str) -> Rule:
    def rule(node: fx.Node, a: Expr, b: Expr, alpha: Any = 1) -> Expr:
        return E.call(op, a, b if alpha == 1 else E.call("mul", b, alpha))
    return rule


def _rsub(node: fx.Node, a: Expr, b: Expr, alpha: Any = 1) -> Expr:
    return E.call("sub", b, a if alpha == 1 else E.call("mul", a, alpha))


def _div(node: fx.Node, a: Expr, b: Expr, *, rounding_mode: str | None = None) -> Expr:
    if rounding_mode is None:
        return _quotient(a, b)
    if rounding_mode == "floor" and a.dtype == b.dtype == E.INT:
        return E.call("floordiv", a, b)
    raise Decline(f"division with rounding_mode={rounding_mode!r}", node)


def _quotient(a: Expr, b: Expr) -> Expr:
    """a / b, where 1 / (1 + exp(-x)) is the sigmoid of x."""
    if a.op == "const" and a.value == 1 and b.op == "add" and b.args[1].op == "const" \
            and b.args[1].value == 1 and b.args[0].op == "exp":
        return E.call("sigmoid", -b.args[0].args[0])
    return E.call("div", a, b)


def _mul(node: fx.Node, a: Expr, b: Expr) -> Expr:
    """a * b, where a * (1 / b) is a / b."""
    for x, y in ((a, b), (b, a)):
        if y.op == "div" and y.args[0].op == "const" and y.args[0].value == 1:
            return E.call("div", x, y.args[1])
    return E.call("mul", a, b)


def _exp(node: fx.Node, a: Expr) -> Expr:
    return a.args[0] if a.op == "log" else E.call("exp", a)


def _maximum(node: fx.Node, a: Expr, b: Expr) -> Expr:
    """max(a, 0) is relu."""
    if b.op == "const" and b.value == 0 and a.dtype == E.FLOAT:
        return E.call("relu", a)
    return E.call("maximum", a, b)


def _unary(op: str) -> Rule:
    return lambda node, a: E.call(op, a)


def _binary(op: str) -> Rule:
    return lambda node, a, b: E.call(op, a, b)


def _swapped(op: str) -> Rule:
    return lambda node, a, b: E.call(op, b, a)


def _pow(node: fx.Node, a: Expr, b: Expr) -> Expr:
    if b.op == "const" and b.value == 2:
        return E.call("mul", a, a)
    if b.op == "const" and b.value == -1:
        return E.call("div", 1.0, a)
    return E.call("pow", a, b)


def _where(node: fx.Node, c: Expr, a: Expr, b: Expr) -> Expr:
    return E.where(c, a, b)


def _masked_fill(node: fx.Node, a: Expr, c: Expr, value: Expr) -> Expr:
    return E.where(c, value, a)


def _clamp(node: fx.Node, a: Expr, low: Any = None, high: Any = None, *, min: Any = None,
           max: Any = None) -> Expr:
    low, high = low if min is None else min, high if max is None else max
    if low is not None:
        a = _maximum(node, a, E.wrap(low))
    return a if high is None else E.call("minimum", a, high)


def _clamp_max(node: fx.Node, a: Expr, high: Expr) -> Expr:
    return E.call("minimum", a, high)


def _softplus(node: fx.Node, a: Expr, beta: Any = 1, threshold: Any = 20) -> Expr:
    def number(x: Any) -> Any:
        return x.value if isinstance(x, Expr) else x
    if number(beta) != 1 or number(threshold) < 20:
        raise Decline("softplus with beta or threshold of its own", node)
    return E.call("softplus", a)


def _logaddexp(node: fx.Node, a: Expr, b: Expr) -> Expr:
    """log(exp(a) + exp(c)) of a number c is softplus(a - c) + c."""
    if b.op != "const" or not math.isfinite(b.value):
        raise Decline("logaddexp of other than a number", node)
    return E.call("softplus", a) if b.value == 0 else E.call("softplus", a - b) + b


def _nan_to_num(node: fx.Node, a: Expr, nan: Any = None, posinf: Any = None,
                neginf: Any = None) -> Expr:
    def number(x: Any, default: float) -> Expr:
        return E.wrap(default if x is None else x)
    info = torch.finfo(node.meta["val"].dtype)
    clean = E.where(E.call("isnan", a), number(nan, 0.0), a)
    clean = E.where(a.eq(math.inf), number(posinf, info.max), clean)
    return E.where(a.eq(-math.inf), number(neginf, info.min), clean)


def _addcmul(node: fx.Node, a: Expr, b: Expr, c: Expr, *, value: Any = 1) -> Expr:
    return a + b * c * E.wrap(value)


def _square(node: fx.Node, a: Expr) -> Expr:
    return E.call("mul", a, a)


def _dropout(node: fx.Node, a: Expr, p: Any, train: Any) -> Expr:
    if _plain(train) and _plain(p) != 0:
        raise Decline("dropout before the softmax", node)
    return a


def _plain(x: Any) -> Any:
    return x.value if isinstance(x, Expr) else x


POINTWISE: dict[str, Rule] = {
    "add": _alpha("add"), "sub": _alpha("sub"), "subtract": _alpha("sub"), "rsub": _rsub,
    "mul": _mul, "multiply": _mul, "div": _div, "divide": _div,
    "true_divide": _div, "minimum": _binary("minimum"), "maximum": _maximum,
    "pow": _pow, "square": _square, "clamp": _clamp, "clamp_max": _clamp_max, "clip": _clamp,
    "clamp_min": _maximum, "exp": _exp, "reciprocal": lambda node, a: E.call("div", 1.0, a),
    "softplus": _softplus, "logaddexp": _logaddexp, "nan_to_num": _nan_to_num, "addcmul": _addcmul,
    "where": _where, "masked_fill": _masked_fill, "dropout": _dropout,
    **{op: _unary(op) for op in ("neg", "abs", "exp2", "log", "log1p", "sqrt", "rsqrt",
                                 "tanh", "sigmoid", "relu", "cos", "sin", "sign", "erf",
                                 "isnan")},
    "logical_and": _binary("and"), "bitwise_and": _binary("and"), "__and__": _binary("and"),
    "logical_or": _binary("or"), "bitwise_or": _binary("or"), "__or__": _binary("or"),
    "logical_not": _unary("not"), "bitwise_not": _unary("not"),
    "lt": _binary("lt"), "le": _binary("le"), "gt": _swapped("lt"), "ge": _swapped("le"),
    "eq": _binary("eq"), "ne": _binary("ne"),
}
CASTS = frozenset(("to", "_to_copy", "type_as", "float", "half", "bfloat16", "double"))


def is_cast(node: fx.Node) -> bool:
    """A conversion between floating types. (Of 16 bits or more: to 8 bits is to quantise.)"""
    if node.op != "call_function" or op_name(node) not in CASTS:
        return False
    source = node.args[0]
    return is_tensor(source) and all(
        n.meta["val"].is_floating_point() and n.meta["val"].dtype.itemsize > 1
        for n in (source, node))  # type: ignore[union-attr]


def is_pointwise(node: fx.Node) -> bool:
    return node.op == "call_function" and (op_name(node) in POINTWISE or is_cast(node))


def apply(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Expr:
    """The Expr of a pointwise node, given its arguments as expressions."""
    try:
        return POINTWISE[op_name(node)](node, *args, **kwargs)
    except TypeError as error:
        raise Decline(f"{op_name(node)} with arguments that are not understood", node) from error
