"""Expr -> C++ statements on floats, ints, truth values and vectors of W of them.

A value of level "head" or "row" is a scalar, one of level "column" or "cell" a vector over W
neighbouring columns (see `vectors.h`, which overloads every function for both). Integers have 32
bits; `attnopt.kernels.cpp.call` sees to it that none is larger.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.lanes import look_up
from attnopt.kernels.printing import Printer

_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "eq": "==",
          "ne": "!="}
_LOGIC = {"and": "&", "or": "|", "xor": "^"}
_CALLS = {
    "abs": "absolute", "minimum": "minimum", "maximum": "maximum", "floordiv": "floor_div",
    "mod": "floor_mod", "where": "pick", "exp": "exp_", "exp2": "exp2_", "log": "log_",
    "log1p": "log1p_", "sqrt": "sqrt_", "rsqrt": "rsqrt_", "tanh": "tanh_", "sigmoid": "sigmoid",
    "softplus": "softplus", "relu": "relu", "pow": "pow_", "cos": "cos_", "sin": "sin_",
    "sign": "sign", "erf": "erf_", "round": "nearest", "float": "to_float", "int": "to_int",
    "floor": "floored",
}
#: lanes of the widest vectors: what holds for them holds for all
WIDEST = 16
_SCALARS = {E.INT: "int32_t", E.BOOL: "bool", E.FLOAT: "float"}
_VECTORS = {E.INT: "vi", E.BOOL: "vi", E.FLOAT: "vf"}


class CppPrinter(Printer):
    """C++ statements; `ranks` are the numbers of axes of tables that are gathered, by slot."""

    #: whether lanes are neighbouring columns wherever `column` is an int
    neighbours = True

    def __init__(self, axes_of: Callable[[str], Iterable[str]], ranks: Mapping[str, int],
                 column: str = "k", prefix: str = "v") -> None:
        super().__init__(axes_of, column)
        self.ranks, self.prefix = ranks, prefix

    def wide(self, node: Expr) -> bool:
        """Whether the node is a vector."""
        return self.levels[node] in ("column", "cell") and node.op != "const"

    def level(self, node: Expr) -> str:
        if node.op == "load" and not node.args and self.column in self.axes_of(node.value):
            return "cell" if "q" in self.axes_of(node.value) else "column"
        return super().level(node)

    def kind(self, node: Expr) -> str:
        """The C++ type of its value."""
        return (_VECTORS if self.levels[node] in ("column", "cell") else _SCALARS)[node.dtype]

    def assign(self, node: Expr, level: str, name: str, text: str) -> str:
        return f"const {self.kind(node)} {name} = {text};"

    def leaf(self, node: Expr, args: list[str]) -> str:
        match node.op:
            case "const":
                return constant(node)
            case "size":
                return f"size_{node.value}"
            case "index":
                return f"index_{node.value}"
            case "load":
                return self.load(node, args)
        raise ValueError(f"{node} must be given by the template")

    def load(self, node: Expr, args: list[str]) -> str:
        kind = _SCALARS[node.dtype]
        if not node.args:
            level = self.levels[node]
            place = {"head": "", "row": ", index_q", "column": ", column",
                     "cell": ", index_q, column"}[level]
            return f"op_{node.value}.at_{level}<{kind}>(place{place})"
        if self.ranks[node.value] != len(args):
            raise ValueError(f"operand {node.value!r} must have {len(args)} axes, got "
                             f"{self.ranks[node.value]}")
        how = self.look_up(node)
        column = "" if how == "gather" else "column, "
        return f"op_{node.value}.{how}<{kind}>({column}{', '.join(args)})"

    def look_up(self, node: Expr) -> str:
        """How a table is read: "run", "same" or "gather", see `attnopt.ir.lanes`."""
        if self.wide(node) and self.neighbours:
            return look_up(node.args, WIDEST, lambda e: not self.wide(e), self.column)
        return "gather"

    def operation(self, node: Expr, args: list[str]) -> str:
        op = node.op
        wide = any(self.wide(a) for a in node.args)
        if op in _LOGIC:
            left, right = (f"mask({a})" if wide else a for a in args)
            return f"{left} {_LOGIC[op]} {right}"
        if op == "not":
            return f"~{args[0]}" if wide else f"!{args[0]}"
        if op == "neg":
            return f"-{args[0]}"
        if op == "isnan":
            return f"{args[0]} != {args[0]}"
        if op == "bool":
            return f"{args[0]} != 0"
        if op in ("eq", "ne") and wide and node.args[0].dtype == E.BOOL:
            return f"mask({args[0]}) {_INFIX[op]} mask({args[1]})"
        if op in ("int", "float") and wide and node.args[0].dtype == E.BOOL:
            one = "1" if op == "int" else "1.0f"
            return f"pick({args[0]}, vec({one}), vec({'0' if op == 'int' else '0.0f'}))"
        if op == "where" and wide:
            condition, *values = args
            lift = "mask" if node.dtype == E.BOOL else "vec"
            return f"pick(mask({condition}), {', '.join(f'{lift}({v})' for v in values)})"
        if op in ("minimum", "maximum", "pow") and wide:
            args = [f"vec({a})" for a in args]
        if op in _CALLS:
            return f"{_CALLS[op]}({', '.join(args)})"
        return f"{args[0]} {_INFIX[op]} {args[1]}"


def constant(node: Expr) -> str:
    """A number as C++ writes it; negative ones in brackets."""
    value = node.value
    if node.dtype == E.BOOL:
        return "true" if value else "false"
    if node.dtype == E.INT:
        if not -2**31 < value < 2**31:
            raise ValueError(f"an int must fit 32 bits, got {value}")
        return f"({value})" if value < 0 else str(value)
    if math.isnan(value):
        return "NOT_A_NUMBER"
    if math.isinf(value):
        return "INF" if value > 0 else "(-INF)"
    if abs(value) > 3.4028234663852886e38:
        return "INF" if value > 0 else "(-INF)"
    text = f"{value!r}f" if "." in repr(value) or "e" in repr(value) else f"{value!r}.0f"
    return f"({text})" if value < 0 else text
