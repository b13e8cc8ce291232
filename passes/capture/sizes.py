"""For which sizes of the inputs a captured graph is right, as one Python function.

A graph with symbolic sizes was traced under conditions: ranges (2 and more), equalities between
dimensions, and what the author's branches asked. The tracer does not check them at a call, so we
do: the conditions are printed to Python once and compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.utils._sympy.printers import PythonPrinter

from attnopt.ir.captured import SizeRange

Fits = Callable[[Sequence[Any]], bool]


@dataclass(frozen=True)
class Sizes:
    """Symbols with their ranges, the conditions on them, and the compiled test.

    `fits(leaves)` takes the flat user inputs and tells whether all sizes are in the traced ranges;
    None where no size is symbolic.
    """

    symbols: dict[str, SizeRange]
    conditions: tuple[str, ...]
    fits: Fits | None


def sizes_of(inputs: Sequence[Any]) -> Sizes:
    """The conditions on the user inputs of a trace.

    Args:
        inputs: "val" meta of the placeholders of the flat user inputs: fake tensors, SymInts or
            plain values.
    """
    environment = next((env for value in inputs if (env := _shape_env(value)) is not None), None)
    if environment is None:
        return Sizes({}, (), None)
    bound: dict[sympy.Symbol, str] = {}
    lines: list[str] = []
    later: list[tuple[str, sympy.Expr]] = []
    for position, value in enumerate(inputs):
        for text, expression in _expressions(value, f"x[{position}]"):
            expression = environment.replace(expression)
            if expression.is_symbol and expression not in bound:
                bound[expression] = str(expression)
                lines.append(f"{expression} = {text}")
            else:
                later.append((text, expression))
    if not bound and not later:
        return Sizes({}, (), None)
    symbols = {str(s): _range(environment.var_to_range.get(s)) for s in bound}
    conditions = [f"{r.low} <= {s}" + ("" if r.high is None else f" <= {r.high}")
                  for s, r in symbols.items() if r.low > 0 or r.high is not None]
    printer = PythonPrinter()
    # A size that the trace came to fix is a number here, which no other check compares.
    conditions += [f"{text} == {printer.doprint(e)}" for text, e in later]
    asked = dict.fromkeys(
        environment.replace(guard.expr) for guard in environment.guards)
    general = [printer.doprint(e) for e in asked
               if e.free_symbols and e.free_symbols <= bound.keys()]
    source = "def fits(x):\n" + "".join(f"    {line}\n" for line in lines)
    source += f"    return {' and '.join(f'({c})' for c in conditions + general) or 'True'}\n"
    scope: dict[str, Any] = {"math": math, "torch": torch}
    exec(compile(source, "<sizes of a captured graph>", "exec"), scope)
    return Sizes(symbols, tuple(general), scope["fits"])


def _shape_env(value: Any) -> Any:
    if isinstance(value, torch.SymInt):
        return value.node.shape_env
    if isinstance(value, torch.Tensor):
        return next((env for size in value.shape if (env := _shape_env(size)) is not None), None)
    return None


def _expressions(value: Any, text: str) -> list[tuple[str, sympy.Expr]]:
    if isinstance(value, torch.SymInt):
        return [(text, value.node.expr)]
    if not isinstance(value, torch.Tensor):
        return []
    sizes: list[Any] = list(value.shape)
    return [(f"{text}.shape[{d}]", size.node.expr) for d, size in enumerate(sizes)
            if isinstance(size, torch.SymInt)]


def _range(values: Any) -> SizeRange:
    if values is None:
        return SizeRange(0)
    high = int(values.upper) if isinstance(values.upper, sympy.Integer) else None
    low = int(values.lower) if isinstance(values.lower, sympy.Integer) else 0
    return SizeRange(low, high)
