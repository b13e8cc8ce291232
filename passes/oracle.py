"""The oracle: the nodes of a region run again with every floating operation in float64.

Indices and boolean decisions are computed from the values of the original run. A cast between
floating types on the way from scores to result only rounds, and is dropped; a constant keeps the
rounding of the type it was made in. Dropout is left out on both sides: the draw is not part of
the formula.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from attnopt.passes.normalize import op_name
from attnopt.passes.recognize.pointwise import is_cast
from attnopt.passes.recognize.program import SOFTMAX

aten = torch.ops.aten
Number = Callable[[Any], Any]


def double(x: Any) -> Any:
    """`x` in float64 if it is a floating tensor, else as it is."""
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def symbol_value(sizes: Mapping[str, int]) -> Number:
    """SymInt -> int, given the values of the symbols."""
    def number(symbolic: Any) -> int:
        expr = symbolic.node.expr
        return int(expr.subs({s: sizes[str(s)] for s in expr.free_symbols}))
    return number


def run(end: fx.Node, known: dict[fx.Node, Any], *, precise: bool,
        number: Number | None = None) -> Any:
    """The value of `end`, given the values of the nodes in `known` (which it fills up).

    precise: floating operations in float64, otherwise exactly as the program says.
    number:  gives SymInts their value where the node that computes one is not known.
    """
    stack = [end]
    while stack:
        node = stack[-1]
        if node in known:
            stack.pop()
            continue
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and number is not None:
            known[node] = number(value)
            stack.pop()
            continue
        missing = [n for n in node.all_input_nodes if n not in known]
        if missing:
            stack.extend(missing)
            continue
        known[node] = _execute(node, known, precise)
        stack.pop()
    return known[end]


def _execute(node: fx.Node, known: Mapping[fx.Node, Any], precise: bool) -> Any:
    if node.op != "call_function":
        raise RuntimeError(f"the value of {node.op} {node.name} must be known")
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), known.__getitem__)
    name = op_name(node)
    if name == "dropout":
        return args[0]
    if name == "copy":  # torch's own has no derivative
        return args[1].to(args[0].dtype).expand(args[0].shape)
    if name == "scaled_dot_product_attention":
        args = tuple(a if i != 4 else 0.0 for i, a in enumerate(args))
        kwargs = {k: v for k, v in kwargs.items() if k != "dropout_p"}
    if not precise or node.target is operator.getitem:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    if is_cast(node):
        return args[0]
    if name in SOFTMAX:
        function = torch.log_softmax if "log" in name else torch.softmax
        return function(args[0], args[1])
    if isinstance(kwargs.get("dtype"), torch.dtype) and kwargs["dtype"].is_floating_point \
            and args and isinstance(args[0], torch.Tensor) and name not in (
                "full_like", "zeros_like", "ones_like", "new_full", "new_zeros", "new_ones"):
        kwargs = {**kwargs, "dtype": torch.float64}
    args = tuple(map(double, args))
    return _double_all(node.target(*_like(node, args), **kwargs))  # type: ignore[operator]


def _like(node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Lists of tensors (cat, stack, einsum, index) share one floating type."""
    return tuple([double(x) for x in a] if isinstance(a, (list, tuple)) and any(
        isinstance(x, torch.Tensor) for x in a) else a for a in args)


def _double_all(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(map(_double_all, value)) if type(value) in (tuple, list) else \
            tuple(map(_double_all, value))
    return double(value)
