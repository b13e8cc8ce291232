"""Evaluate an `Expr` on torch tensors: the reference meaning of every operation.

Works in the dtype of the tensors it is given, differentiates, traces and takes symbolic sizes, so
it serves the float64 reference and the ATen lowering alike. A result may be smaller than the full
shape (it broadcasts to it) or a plain number.

An index of a `load` may lie outside of the operand, as in the branch of a `where` that is not
taken; the value is then that of the nearest element.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.folding import fold
from attnopt.ir.spec import leading_axes


def axis_names(rank: int, last: tuple[str, str] = ("q", "k")) -> tuple[str, ...]:
    """Names of the axes of a rank-`rank` score in tensor order: (…, b1, b, h, q, k)."""
    return (*leading_axes(rank - 2), *last)


@dataclass
class Env:
    """What the leaves of an Expr mean.

    shape:    full shape of the score (*L, Q, K), or (*L, Q, Dv) when `last` is ("q", "d")
    operands: tensors by slot
    leaves:   tensors of score, weight, out, value and row statistics
    sizes:    lengths of axes that `shape` does not have (k in an output epilogue)
    rows:     start of a block of query rows: `shape` then has the rows of the block only, operands
              that vary along q are narrowed to them, and size("q") comes from `sizes`
    dtype:    of numbers that become floats: an index, a truth value, a constant
    """

    shape: tuple[int, ...]
    operands: Mapping[str, Tensor] = field(default_factory=dict)
    leaves: Mapping[Expr, Tensor] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    rows: int | None = None
    last: tuple[str, str] = ("q", "k")
    dtype: torch.dtype = torch.float32
    device: torch.device | None = None

    def __post_init__(self) -> None:
        self.axes = axis_names(len(self.shape), self.last)

    def size(self, axis: str) -> int:
        if axis in self.sizes:
            return self.sizes[axis]
        if axis not in self.axes:
            raise ValueError(f"axis must be one of {', '.join(self.axes)}, got {axis!r}")
        return self.shape[self.axes.index(axis)]

    def index(self, axis: str) -> Tensor:
        """Positions along `axis`, shaped to broadcast against the full shape."""
        if axis not in self.axes:
            raise ValueError(f"axis must be one of {', '.join(self.axes)}, got {axis!r}")
        place = self.axes.index(axis)
        start = self.rows or 0 if axis == "q" else 0
        steps = torch.arange(start, start + self.shape[place], device=self.device)
        return steps.view(-1, *[1] * (len(self.axes) - 1 - place))

    def broadcast(self, slot: str) -> Tensor:
        """An operand as it broadcasts against the score, narrowed to the block of rows."""
        tensor = self.operand(slot)
        if self.rows is not None and tensor.dim() >= 2 and tensor.shape[-2] != 1:
            tensor = tensor.narrow(-2, self.rows, self.shape[-2])
        return tensor

    def operand(self, slot: str) -> Tensor:
        if slot not in self.operands:
            raise ValueError(f"operands must have {slot!r}, got {sorted(self.operands)}")
        return self.operands[slot]

    def gather(self, slot: str, places: list[Any], indices: tuple[Expr, ...]) -> Tensor:
        """operand[indices], by views where every index is a whole axis."""
        table = self.operand(slot)
        if table.dim() != len(places):
            raise ValueError(f"operand {slot!r} must have {len(places)} axes, got {table.dim()}")
        names = [e.value if e.op == "index" else None for e in indices]
        whole = all(
            name is not None and not (name == "q" and self.rows is not None)
            and table.shape[i] == self.size(name) for i, name in enumerate(names))
        if whole and len(set(names)) == len(names):
            order = sorted(range(len(names)), key=lambda i: self.axes.index(indices[i].value))
            shape = [self.size(a) if a in names else 1 for a in self.axes]
            return table.permute(order).reshape(shape)
        clamped = []
        for i, place in enumerate(places):
            if torch.is_tensor(place):
                name = names[i]
                whole_axis = name is not None and table.shape[i] == self.size(name)
                clamped.append(place if whole_axis else place.clamp(0, table.shape[i] - 1))
            else:
                clamped.append(min(max(place, 0), table.shape[i] - 1))
        return table[tuple(clamped)]


def evaluate(expr: Expr, env: Env) -> Any:
    """The value of `expr`: a tensor that broadcasts to `env.shape`, or a number."""
    done: dict[Expr, Any] = {}
    for node in expr.walk():
        done[node] = _leaf(node, done, env) if node.op in E._LEAVES else _apply(
            node, [done[a] for a in node.args], env)
    return done[expr]


def _leaf(node: Expr, done: dict[Expr, Any], env: Env) -> Any:
    match node.op:
        case "const":
            return node.value
        case "index":
            return env.index(node.value)
        case "size":
            return env.size(node.value)
        case "load" if node.args:
            return env.gather(node.value, [done[a] for a in node.args], node.args)
        case "load":
            return env.broadcast(node.value)
        case "inner":
            query, key = node.value
            return env.broadcast(query) @ env.operand(key).transpose(-1, -2)
    if node not in env.leaves:
        raise ValueError(f"{node} has no value here; it must be one of {list(env.leaves)}")
    return env.leaves[node]


def _apply(node: Expr, args: list[Any], env: Env) -> Any:
    if not any(torch.is_tensor(a) for a in args):
        if node.op in _SYMBOLIC and not all(isinstance(a, int | float) for a in args):
            return _SYMBOLIC[node.op](*args)
        value = fold(node.op, *args)
        if value is not None:
            return value
        args = [torch.as_tensor(a, dtype=_DTYPES.get(e.dtype, env.dtype), device=env.device)
                for a, e in zip(args, node.args, strict=True)]
    if node.op == "float":
        return args[0].to(env.dtype)
    if node.op == "where":
        return _where(args, node, env)
    return (_UNARY if len(args) == 1 else _BINARY)[node.op](*args)


def _where(args: list[Any], node: Expr, env: Env) -> Any:
    condition, yes, no = args
    if not torch.is_tensor(condition):
        return yes if condition else no
    if not torch.is_tensor(yes) and not torch.is_tensor(no):
        dtype = _DTYPES.get(node.dtype, env.dtype)
        yes = torch.full((), yes, dtype=dtype, device=condition.device)
    return torch.where(condition, yes, no)


def _extreme(tensor_op: Callable[..., Tensor], bound: str) -> Callable[[Any, Any], Tensor]:
    """minimum / maximum of tensors, or of a tensor and a number."""
    def apply(a: Any, b: Any) -> Tensor:
        if torch.is_tensor(a) and torch.is_tensor(b):
            return tensor_op(a, b)
        tensor, number = (a, b) if torch.is_tensor(a) else (b, a)
        return torch.clamp(tensor, **{bound: number})
    return apply


#: what a symbolic size needs instead of Python's own functions, which would fix its value
_SYMBOLIC: dict[str, Callable[..., Any]] = {
    "float": torch.sym_float, "minimum": torch.sym_min, "maximum": torch.sym_max,
}
_DTYPES = {E.INT: torch.int64, E.BOOL: torch.bool}
_UNARY: dict[str, Callable[[Any], Any]] = {
    "neg": lambda a: -a, "not": torch.logical_not, "abs": torch.abs, "exp": torch.exp,
    "exp2": torch.exp2, "log": torch.log, "log1p": torch.log1p, "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "relu": torch.relu,
    # The default threshold of 20 is visible in float64; from 40 on log1p(exp(x)) is x.
    "softplus": lambda a: F.softplus(a, threshold=40), "cos": torch.cos, "sin": torch.sin,
    "sign": torch.sign, "erf": torch.erf, "round": torch.round, "isnan": torch.isnan,
    "int": lambda a: a.to(torch.int64), "floor": lambda a: torch.floor(a).to(torch.int64),
    "bool": lambda a: a.to(torch.bool),
}
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b, "pow": lambda a, b: a**b,
    "floordiv": lambda a, b: torch.floor_divide(a, b) if torch.is_tensor(a) else a // b,
    "mod": torch.remainder,
    "minimum": _extreme(torch.minimum, "max"), "maximum": _extreme(torch.maximum, "min"),
    "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b,
    "lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
}
