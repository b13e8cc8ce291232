"""The derivative of an `Expr` with respect to one of its leaves, as an `Expr`.

    derivative(logits, score)         what a gradient of the logits becomes at the raw score
    derivative(logits, load("bias"))  and at an additive operand

The rules are those of torch's autograd where a function has a corner: 0 at 0 for abs and relu, a
half to each side where minimum or maximum has equal arguments, 0 for comparisons, roundings and
casts to int. A `where` selects between the derivatives, so that a branch that is not taken gives
nothing even where its own derivative is infinite.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr

ZERO, ONE = E.const(0.0), E.const(1.0)
#: operations that are constant between their steps
_FLAT = frozenset(("sign", "round", "int", "floor", "lt", "le", "eq", "ne", "and", "or", "xor",
                   "not", "bool", "isnan", "floordiv"))


@functools.lru_cache(maxsize=2048)
def derivative(expr: Expr, leaf: Expr) -> Expr:
    """d expr / d leaf, a float Expr over the leaves of `expr`; const 0.0 where it has none.

    Raises ValueError where `leaf` is no float leaf, and for the remainder by what depends on it.
    """
    if leaf.dtype != E.FLOAT or leaf.op not in E._LEAVES or leaf.op == "const":
        raise ValueError(f"leaf must be a float leaf, got {leaf}")
    found: dict[Expr, Expr] = {}
    for node in expr.walk():
        if node is leaf:
            found[node] = ONE
        elif node.op in E._LEAVES or node.op in _FLAT or node.dtype != E.FLOAT:
            found[node] = ZERO
        else:
            found[node] = _rule(node, [found[a] for a in node.args])
    return found[expr]


def depends(expr: Expr, leaf: Expr) -> bool:
    """Whether the derivative is not simply zero."""
    return derivative(expr, leaf) is not ZERO


def _rule(node: Expr, inner: list[Expr]) -> Expr:
    if all(d is ZERO for d in inner):
        return ZERO
    if node.op == "where":
        return E.where(node.args[0], inner[1], inner[2])
    if node.op in _BINARY:
        return _BINARY[node.op](node, node.args[0], node.args[1], inner[0], inner[1])
    return _times(_UNARY[node.op](node, node.args[0]), inner[0])


def _times(a: Expr, b: Expr) -> Expr:
    if a is ZERO or b is ZERO:
        return ZERO
    return b if a is ONE else a * b


def _plus(a: Expr, b: Expr) -> Expr:
    return b if a is ZERO else a if b is ZERO else a + b


def _minus(a: Expr, b: Expr) -> Expr:
    return a if b is ZERO else -b if a is ZERO else a - b


def _quotient(node: Expr, a: Expr, b: Expr, da: Expr, db: Expr) -> Expr:
    first = ZERO if da is ZERO else da / b
    return _minus(first, ZERO if db is ZERO else _times(db, node / b))


def _power(node: Expr, a: Expr, b: Expr, da: Expr, db: Expr) -> Expr:
    total = ZERO
    if da is not ZERO:
        slope = E.where(b.eq(0.0), 0.0, b * E.call("pow", a, b - 1.0))
        total = _times(slope, da)
    if db is not ZERO:
        # 0 ** b is flat for b > 0, although log(0) is not finite
        slope = E.where(a.eq(0.0) & (E.const(0.0) <= b), 0.0, node * E.call("log", a))
        total = _plus(total, _times(slope, db))
    return total


def _extreme(first_is_it: Callable[[Expr, Expr], Expr]
             ) -> Callable[[Expr, Expr, Expr, Expr, Expr], Expr]:
    def rule(node: Expr, a: Expr, b: Expr, da: Expr, db: Expr) -> Expr:
        # A clamp by a number lets the gradient through on the bound itself, as torch's does.
        if a.op == "const" or b.op == "const":
            same = db if a.op == "const" else da
        else:
            same = _times(_plus(da, db), E.const(0.5))
        return E.where(a.eq(b), same, E.where(first_is_it(a, b), da, db))
    return rule


def _remainder(node: Expr, a: Expr, b: Expr, da: Expr, db: Expr) -> Expr:
    if db is not ZERO:
        raise ValueError(f"mod must be by something that does not depend on the leaf, got {node}")
    return da


_BINARY: dict[str, Callable[[Expr, Expr, Expr, Expr, Expr], Expr]] = {
    "add": lambda n, a, b, da, db: _plus(da, db),
    "sub": lambda n, a, b, da, db: _minus(da, db),
    "mul": lambda n, a, b, da, db: _plus(_times(b, da), _times(a, db)),
    "div": _quotient, "pow": _power, "mod": _remainder,
    "minimum": _extreme(lambda a, b: a < b), "maximum": _extreme(lambda a, b: b < a),
}
_UNARY: dict[str, Callable[[Expr, Expr], Expr]] = {
    "neg": lambda n, a: E.const(-1.0),
    "abs": lambda n, a: E.call("sign", a),
    "float": lambda n, a: ONE,
    "exp": lambda n, a: n,
    "exp2": lambda n, a: n * math.log(2.0),
    "log": lambda n, a: 1.0 / a,
    "log1p": lambda n, a: 1.0 / (a + 1.0),
    "sqrt": lambda n, a: 0.5 / n,
    "rsqrt": lambda n, a: -0.5 * n * n * n,
    "tanh": lambda n, a: 1.0 - n * n,
    "sigmoid": lambda n, a: n * (1.0 - n),
    "softplus": lambda n, a: E.call("sigmoid", a),
    "relu": lambda n, a: E.where(a <= 0.0, 0.0, 1.0),
    "cos": lambda n, a: -E.call("sin", a),
    "sin": lambda n, a: E.call("cos", a),
    "erf": lambda n, a: E.call("exp", -(a * a)) * (2.0 / math.sqrt(math.pi)),
}
