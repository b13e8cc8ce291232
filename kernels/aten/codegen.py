"""Expr -> a Python function on torch tensors, printed and compiled once per expression.

The program asks a `Tile` for its leaves and works in place where that is allowed:

    "none"  never: under functorch and while tracing
    "safe"  where autograd needs neither the tensor that is overwritten nor an earlier version of
            it: add, sub, mul and div by a number, neg, on a result that has one use
    "all"   wherever the tensor has no later use: inference

Only the full-size tensors that the caller hands over (score, weight, out), and results made from
them, are ever overwritten; operands never are. What an operation means is said in
`attnopt.ir.evaluate`.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.folding import fold
from attnopt.kernels.aten.tile import Tile

MODES = ("none", "safe", "all")
_OWNED = ("score", "weight", "out")
# Methods of Tensor with a trailing "_" twin.
_UNARY = frozenset(("exp", "exp2", "log", "log1p", "sqrt", "rsqrt", "tanh", "sigmoid", "relu",
                    "cos", "sin", "sign", "erf", "round", "neg", "abs"))
_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "pow": "**", "floordiv": "//",
          "mod": "%", "and": "&", "or": "|", "xor": "^", "lt": "<", "le": "<=", "eq": "==",
          "ne": "!="}
_IN_PLACE = {"add": "add_", "sub": "sub_", "mul": "mul_", "div": "div_"}
_CAST = {"not": "{}.logical_not()", "isnan": "{}.isnan()", "int": "{}.to(int64)",
         "floor": "{}.floor().to(int64)", "bool": "{}.to(boolean)",
         "softplus": "softplus({}, threshold=40)", "float": "to_float({}, tile.dtype)"}


@functools.lru_cache(maxsize=2048)
def compiled(expr: Expr, mode: str = "none") -> Callable[[Tile], Any]:
    """A function of a Tile that returns a tensor broadcasting to its shape, or a number."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    printer = _Printer(expr, mode)
    scope = {**_SCOPE, **printer.leaves}
    exec(compile(printer.source, "<attnopt expression>", "exec"), scope)
    return scope["program"]


def source(expr: Expr, mode: str = "none") -> str:
    """The text of that function."""
    return _Printer(expr, mode).source


class _Printer:
    def __init__(self, expr: Expr, mode: str) -> None:
        self.mode = mode
        self.lines: list[str] = []
        self.leaves: dict[str, Any] = {}
        self.names: dict[Expr, str] = {}
        self.scalar: set[Expr] = set()
        #: full-size tensors that may be overwritten, and those that autograd does not hold on to
        self.owned: set[Expr] = set()
        self.unsaved: set[Expr] = set()
        nodes = list(expr.walk())
        self.uses = {node: 0 for node in nodes}
        for node in nodes:
            for arg in node.args:
                self.uses[arg] += 1
        self.left = dict(self.uses)
        for node in nodes:
            text = self.leaf(node) if node.op in E._LEAVES else self.operation(node)
            for arg in node.args:
                self.left[arg] -= 1
            if node.op == "const":
                self.names[node] = text
            else:
                self.names[node] = f"v{len(self.lines)}"
                self.lines.append(f"    {self.names[node]} = {text}")
        body = "\n".join([*self.lines, f"    return {self.names[expr]}"])
        self.source = f"def program(tile):\n{body}\n"

    def leaf(self, node: Expr) -> str:
        match node.op:
            case "const":
                self.scalar.add(node)
                return f"({node.value!r})"
            case "size":
                self.scalar.add(node)
                return f"tile.size({node.value!r})"
            case "index":
                return f"tile.index({node.value!r})"
            case "inner":
                return f"tile.inner({node.value[0]!r}, {node.value[1]!r})"
            case "load" if not node.args:
                return f"tile.broadcast({node.value!r})"
            case "load":
                places = ", ".join(self.names[a] for a in node.args)
                names = tuple(a.value if a.op == "index" else None for a in node.args)
                return f"tile.gather({node.value!r}, ({places},), {names!r})"
        if node.op in _OWNED:
            self.owned.add(node)
            if node.op != "weight":  # a softmax keeps its result for the backward pass
                self.unsaved.add(node)
        name = f"leaf{len(self.leaves)}"
        self.leaves[name] = node
        return f"tile.leaves[{name}]"

    def operation(self, node: Expr) -> str:
        args = [self.names[a] for a in node.args]
        if all(a in self.scalar for a in node.args):
            self.scalar.add(node)
            return f"scalar({node.op!r}, {', '.join(args)})"
        if node.op == "where":
            return self.where(node, args)
        if node.op in _UNARY:
            return f"{args[0]}.{node.op}{self.overwrite(node, node.args[0])}()"
        if node.op in _CAST:
            if node.op == "float" and node.args[0] in self.owned and self.last(node.args[0]):
                self.owned.add(node)  # the same tensor when it has that dtype already
            return _CAST[node.op].format(args[0])
        if node.op in ("minimum", "maximum"):
            return self.extreme(node, args)
        if node.op in _IN_PLACE:
            commutes = node.op in ("add", "mul")
            for i, j in ((0, 1), (1, 0)) if commutes else ((0, 1),):
                if self.can(node, node.args[i], node.args[j]):
                    self.result(node)
                    if node.args[j] in self.scalar:
                        return f"{args[i]}.{_IN_PLACE[node.op]}({args[j]})"
                    return f"{node.op}_into({args[i]}, {args[j]})"
        self.result(node, *node.args)
        return f"{args[0]} {_INFIX[node.op]} {args[1]}"

    # -- what may be overwritten ------------------------------------------------------------
    def last(self, node: Expr) -> bool:
        return self.left[node] == 1

    def can(self, node: Expr, target: Expr, other: Expr | None = None) -> bool:
        """Whether `target` may be overwritten by `node`."""
        if target not in self.owned or not self.last(target) or node.dtype != E.FLOAT:
            return False
        if self.mode == "safe":
            linear = node.op in ("add", "sub", "neg", "where") or (
                node.op in ("mul", "div") and other in self.scalar)
            return linear and target in self.unsaved and self.uses[target] == 1
        return self.mode == "all" and other is not target

    def result(self, node: Expr, *args: Expr) -> None:
        """Note that the result of `node` is a tensor of ours."""
        if node.dtype == E.FLOAT and (not args or any(a in self.owned for a in args)):
            self.owned.add(node)
            if node.op in ("add", "sub", "neg", "where") or (
                    node.op in ("mul", "div") and any(a in self.scalar for a in node.args)):
                self.unsaved.add(node)

    def overwrite(self, node: Expr, target: Expr) -> str:
        """"_" when a method may work in place."""
        may = self.can(node, target)
        self.result(node, target)
        return "_" if may else ""

    def extreme(self, node: Expr, args: list[str]) -> str:
        scalars = [a in self.scalar for a in node.args]
        if not any(scalars):
            self.result(node, *node.args)
            return f"torch.{node.op}({args[0]}, {args[1]})"
        tensor, number = (1, 0) if scalars[0] else (0, 1)
        bound = "max" if node.op == "minimum" else "min"
        mark = self.overwrite(node, node.args[tensor])
        return f"{args[tensor]}.clamp{mark}({bound}={args[number]})"

    def where(self, node: Expr, args: list[str]) -> str:
        condition, yes, no = node.args
        if condition in self.scalar:
            return f"{args[1]} if {args[0]} else {args[2]}"
        for tensor, number, hidden in ((1, 2, f"~{args[0]}"), (2, 1, args[0])):
            if node.args[number] in self.scalar and self.can(node, node.args[tensor]):
                self.result(node)
                return f"fill_into({args[tensor]}, {hidden}, {args[number]})"
        if yes in self.scalar and no in self.scalar:
            dtype = {E.INT: "int64", E.BOOL: "boolean", E.FLOAT: "tile.dtype"}[node.dtype]
            return f"pick({', '.join(args)}, {dtype})"
        self.result(node, yes, no)
        return f"torch.where({', '.join(args)})"


# -- what the programs call -----------------------------------------------------------------------
def fits_into(own: Sequence[int], other: Sequence[int]) -> bool:
    """Whether `other` broadcasts to the shape `own`."""
    return len(other) <= len(own) and all(
        other[i] == 1 or other[i] == own[i] for i in range(-len(other), 0))


def fits(target: Tensor, other: Tensor) -> bool:
    """Whether target (op) other has the shape and the dtype of target."""
    if other.dtype != target.dtype and (
            torch.promote_types(target.dtype, other.dtype) != target.dtype):
        return False
    return fits_into(target.shape, other.shape)


def _into(in_place: Callable[[Tensor, Any], Tensor],
          functional: Callable[[Tensor, Any], Tensor]) -> Callable[[Tensor, Any], Tensor]:
    def apply(target: Tensor, other: Any) -> Tensor:
        if not torch.is_tensor(other) or fits(target, other):
            return in_place(target, other)
        return functional(target, other)
    return apply


def fill_into(target: Tensor, hidden: Tensor, number: float) -> Tensor:
    """`number` where `hidden`, target elsewhere; in place if the shapes allow."""
    if fits_into(target.shape, hidden.shape):
        return target.masked_fill_(hidden, number)
    return torch.where(hidden, number, target)


def pick(condition: Tensor, yes: Any, no: Any, dtype: torch.dtype) -> Tensor:
    """torch.where on two numbers, in the given dtype."""
    return torch.where(condition, torch.scalar_tensor(yes, dtype=dtype, device=condition.device),
                       torch.scalar_tensor(no, dtype=dtype, device=condition.device))


def to_float(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if torch.is_tensor(value) else scalar("float", value)


_OPERATOR: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
    "pow": operator.pow, "floordiv": operator.floordiv, "mod": operator.mod, "and": operator.and_,
    "or": operator.or_, "xor": operator.xor, "lt": operator.lt, "le": operator.le,
    "eq": operator.eq, "ne": operator.ne, "neg": operator.neg,
}
_SYMBOLIC: dict[str, Callable[..., Any]] = {
    **_OPERATOR, "where": lambda c, a, b: a if c else b, "abs": abs, "minimum": torch.sym_min,
    "maximum": torch.sym_max, "float": torch.sym_float, "int": torch.sym_int,
    "floor": torch.sym_int, "not": torch.sym_not,
}
_ON_NUMBERS: dict[str, Callable[..., Tensor]] = {
    **_OPERATOR, "float": lambda a: a, "int": lambda a: a.to(torch.int64),
    "floor": lambda a: a.floor().to(torch.int64), "bool": lambda a: a.to(torch.bool),
    "not": torch.logical_not, "softplus": lambda a: F.softplus(a, threshold=40),
}


def scalar(op: str, *args: Any) -> Any:
    """An operation on numbers that may be symbolic; a tensor of rank 0 where that is needed."""
    if not any(isinstance(a, torch.SymInt | torch.SymFloat | torch.SymBool | Tensor)
               for a in args):
        value = fold(op, *args)
        if value is not None:
            return value
    elif op in _SYMBOLIC and not any(torch.is_tensor(a) for a in args):
        return _SYMBOLIC[op](*args)
    tensors = [a if torch.is_tensor(a) else
               torch.scalar_tensor(a, dtype=torch.float64, device="cpu") for a in args]
    if op in _OPERATOR:
        return _OPERATOR[op](*tensors)
    return _ON_NUMBERS[op](*tensors) if op in _ON_NUMBERS else getattr(torch, op)(*tensors)


_SCOPE: dict[str, Any] = {
    "torch": torch, "inf": math.inf, "nan": math.nan, "int64": torch.int64, "boolean": torch.bool,
    "softplus": F.softplus, "to_float": to_float, "scalar": scalar, "pick": pick,
    "fill_into": fill_into, "add_into": _into(Tensor.add_, torch.add),
    "sub_into": _into(Tensor.sub_, torch.sub), "mul_into": _into(Tensor.mul_, torch.mul),
    "div_into": _into(Tensor.div_, torch.div),
}
