"""What the operations of `attnopt.ir.expr` give on Python numbers and truth values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


def fold(op: str, *v: Any) -> Any:
    """The value of `op` on Python constants, or None where it is not defined."""
    try:
        return _FOLD[op](*v)
    except (ZeroDivisionError, ValueError, OverflowError, KeyError):
        return None


_FOLD: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "div": lambda a, b: float(a) / b, "floordiv": lambda a, b: a // b, "mod": lambda a, b: a % b,
    "neg": lambda a: -a, "abs": abs,
    # The sum is nan where one of both is: Python's min and max depend on the order then.
    "minimum": lambda a, b: a + b if a != a or b != b else min(a, b),
    "maximum": lambda a, b: a + b if a != a or b != b else max(a, b),
    "where": lambda c, a, b: a if c else b,
    "exp": math.exp, "exp2": lambda a: 2.0**a, "log": math.log, "log1p": math.log1p,
    "sqrt": math.sqrt, "rsqrt": lambda a: 1 / math.sqrt(a), "tanh": math.tanh,
    "sigmoid": lambda a: 1 / (1 + math.exp(-a)), "softplus": lambda a: math.log1p(math.exp(a)),
    "relu": lambda a: max(a, 0.0), "pow": math.pow, "cos": math.cos,
    "sin": math.sin, "sign": lambda a: float((a > 0) - (a < 0)), "erf": math.erf,
    "round": lambda a: float(round(a)), "float": float, "int": int, "floor": math.floor,
    "and": lambda a, b: a and b, "or": lambda a, b: a or b, "xor": lambda a, b: a != b,
    "not": lambda a: not a, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "bool": bool,
    "isnan": lambda a: a != a,
}
