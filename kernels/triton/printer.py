"""Expr -> Triton: the language of `attnopt.kernels.printing` for GPU kernels.

A kernel has the query index in `q` and the key index in `k` (or the channel in `d`), each with two
axes so that they broadcast against a tile, and every leading index as a scalar under its own name.
Everything is float32, int32 or int1; in a wide kernel, indices and offsets are int64 (see
`attnopt.kernels.triton.widths`). Integers that are loaded keep their own width.

Operand `bias` arrives as a pointer `op_bias` with strides `op_bias_stride_q` …, a gathered table
with strides and lengths by number. A load at the key or channel is masked in tiles that reach over
the edge; the template puts `mask` in place of the mark `MASKED`. Rows are clamped instead, by the
template, and gathered places by evaluate's own rule.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.facts import prove
from attnopt.ir.spec import Operand
from attnopt.kernels.printing import LEVELS, Printer

#: stands in a load for the mask of keys or channels, where the tile has one
MASKED = "{masked}"
_WORD = re.compile(r"[A-Za-z_]\w*")
_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "and": "&", "or": "|", "xor": "^",
          "lt": "<", "le": "<=", "eq": "==", "ne": "!="}
_CALLS = {"abs": "tl.abs", "exp": "tl.exp", "exp2": "tl.exp2", "log": "tl.log",
          "sqrt": "tl.sqrt_rn", "rsqrt": "tl.rsqrt", "sigmoid": "tl.sigmoid", "cos": "tl.cos",
          "sin": "tl.sin", "erf": "tl.erf"}
_OWN = {"tanh": "tanh", "log1p": "log1p", "softplus": "softplus", "sign": "sign",
        "round": "round_half_even", "pow": "power"}
#: operations that may become a call of a function of our own
_FUNCTIONS = frozenset((*_OWN, "floordiv", "mod"))


@dataclass(frozen=True)
class Argument:
    """One run-time argument of a kernel.

    kind: "pointer", "stride", "length" (of tensor `of`, along `axis`: a name, or a number of a
          table's axis), "size" (of `axis`), "list" (an int32 tensor `of`) or "number" (`of`)
    """

    name: str
    kind: str
    of: str = ""
    axis: str = ""


class TritonPrinter(Printer):
    """Prints expressions; `arguments` and `functions` are what they need of the kernel.

    axes_of, column: see the base; wide: integers that the kernel makes itself have 64 bits
    """

    def __init__(self, axes_of: Callable[[str], Iterable[str]], column: str = "k",
                 wide: bool = False) -> None:
        super().__init__(axes_of, column)
        self.wide = wide
        self.int = "tl.int64" if wide else "tl.int32"
        self.arguments: dict[str, Argument] = {}
        self.functions: set[str] = set()
        self._bases: set[str] = set()
        self._count = 0

    # -- statements -------------------------------------------------------------------------
    def put(self, level: str, text: str) -> str:
        """Give `text` a name at a level."""
        name = f"{self.prefix}{self._count}"
        self._count += 1
        self.lines[level].append(f"{name} = {text}")
        return name

    def place(self, node: Expr, level: str, text: str) -> str:
        if node.op == "const" or node.op == "index" and not self.wide:
            return text
        return self.put(level, text)

    def take(self, level: str) -> list[str]:
        """The statements of a level so far, which are then no longer here."""
        lines, self.lines[level] = self.lines[level], []
        return lines

    def all(self) -> list[str]:
        """The statements of all levels, each after those that it needs."""
        return [line for level in LEVELS for line in self.take(level)]

    def argument(self, name: str, kind: str, of: str = "", axis: str = "") -> str:
        self.arguments.setdefault(name, Argument(name, kind, of, axis))
        return name

    # -- leaves -----------------------------------------------------------------------------
    def leaf(self, node: Expr, args: list[str]) -> str:
        match node.op:
            case "const":
                return literal(node)
            case "index":
                return f"tl.cast({node.value}, tl.int64)" if self.wide else str(node.value)
            case "size":
                size = self.argument(f"size_{node.value}", "size", axis=node.value)
                return f"tl.cast({size}, {self.int})"
            case "load" if node.args:
                return self.read(node, self.gathered(node, args))
            case "load":
                return self.read(node, self.broadcast(node.value))
        raise ValueError(f"{node} must be given by the template")

    def read(self, node: Expr, place: str) -> str:
        if node.dtype == E.FLOAT:
            return f"tl.load({place}).to(tl.float32)"
        return f"tl.load({place}) != 0" if node.dtype == E.BOOL else f"tl.load({place})"

    def broadcast(self, slot: str) -> str:
        """Pointers to an operand that broadcasts, with the mark of a mask."""
        axes = tuple(self.axes_of(slot))
        base = self.base(slot, axes)
        for axis, index in (("q", "q_inside"), (self.column, self.column)):
            if axis in axes:
                stride = self.argument(f"op_{slot}_stride_{axis}", "stride", slot, axis)
                base += f" + {self.offset(index)} * {stride}"
        return base + (MASKED if self.column in axes else "")

    def base(self, slot: str, axes: Iterable[str]) -> str:
        """The pointer of this program's leading indices."""
        pointer = self.argument(f"op_{slot}", "pointer", slot)
        leading = [a for a in axes if a not in ("q", "k", "d")]
        if not leading:
            return pointer
        if slot not in self._bases:
            self._bases.add(slot)
            strides = [self.argument(f"op_{slot}_stride_{a}", "stride", slot, a) for a in leading]
            terms = " + ".join(f"tl.cast({a}, tl.int64) * {s}"
                               for a, s in zip(leading, strides, strict=True))
            self.lines["head"].append(f"op_{slot}_here = {pointer} + {terms}")
        return f"op_{slot}_here"

    def offset(self, index: str) -> str:
        return f"tl.cast({index}, tl.int64)" if self.wide else index

    def gathered(self, node: Expr, args: list[str]) -> str:
        """Pointers to table[args], each place clamped to the table."""
        text = self.argument(f"op_{node.value}", "pointer", node.value)
        for i, (arg, expr) in enumerate(zip(args, node.args, strict=True)):
            length = self.argument(f"op_{node.value}_length_{i}", "length", node.value, str(i))
            stride = self.argument(f"op_{node.value}_stride_{i}", "stride", node.value, str(i))
            if expr.op == "const":
                arg = f"tl.full((), {arg}, {self.int})"
            inside = f"tl.minimum(tl.maximum({arg}, 0), {length} - 1)"
            text += " + " + self.put(self.levels[expr], f"{self.offset(inside)} * {stride}")
        return text

    # -- operations -------------------------------------------------------------------------
    def operation(self, node: Expr, args: list[str]) -> str:
        op, whole = node.op, node.args[0].dtype != E.FLOAT
        if op in _FUNCTIONS or all(a.op == "const" for a in node.args):
            # As plain numbers Python would compute with them, and raise where there is no value.
            args = [f"tl.full((), {t}, {_dtype(a, self.int)})" if a.op == "const" else t
                    for t, a in zip(args, node.args, strict=True)]
        if op in ("floordiv", "mod"):
            return self.divided(node, args)
        if op == "pow":
            return self.power(node, args)
        if op in _INFIX:
            return f"{args[0]} {_INFIX[op]} {args[1]}"
        if op in ("minimum", "maximum"):
            keep_nan = "" if whole else ", propagate_nan=tl.PropagateNan.ALL"
            return f"tl.{op}({args[0]}, {args[1]}{keep_nan})"
        if op in _CALLS:
            return f"{_CALLS[op]}({args[0]})"
        if op in _OWN:
            self.functions.add(_OWN[op])
            return f"{_OWN[op]}({args[0]})"
        match op:
            case "where":
                branches = [f"tl.full((), {t}, {_dtype(a, self.int)})" if _tiny(a) else t
                            for t, a in zip(args[1:], node.args[1:], strict=True)]
                return f"tl.where({args[0]}, {', '.join(branches)})"
            case "relu":
                return f"tl.maximum({args[0]}, 0.0, propagate_nan=tl.PropagateNan.ALL)"
            case "neg":
                return f"-{args[0]}"
            case "not":
                return f"~{args[0]}"
            case "float":
                return f"tl.cast({args[0]}, tl.float32)"
            case "int":
                return f"tl.cast({args[0]}, {self.int})"
            case "floor":
                return f"tl.cast(tl.floor({args[0]}), {self.int})"
            case "bool":
                return f"{args[0]} != 0"
            case "isnan":
                return f"{args[0]} != {args[0]}"
        raise ValueError(f"operation must be one of Triton's, got {op}")

    def divided(self, node: Expr, args: list[str]) -> str:
        a, b = node.args
        if node.args[0].dtype == E.FLOAT:
            name = "float_floor_div" if node.op == "floordiv" else "float_mod"
        elif b.op == "const" and b.value > 0 and b.value & (b.value - 1) == 0:
            return (f"{args[0]} >> {b.value.bit_length() - 1}" if node.op == "floordiv"
                    else f"{args[0]} & {b.value - 1}")
        elif (b.op == "size" or b.op == "const" and b.value > 0) and prove(E.const(0) <= a):
            # Rows beyond the last one may be negative here; what becomes of them is not used.
            return f"{args[0]} {'//' if node.op == 'floordiv' else '%'} {args[1]}"
        else:
            name = "floor_div" if node.op == "floordiv" else "floor_mod"
        self.functions.add(name)
        return f"{name}({args[0]}, {args[1]})"

    def power(self, node: Expr, args: list[str]) -> str:
        base, exponent = args[0], node.args[1]
        whole = exponent.op == "const" and float(exponent.value).is_integer()
        if whole and 1 <= exponent.value <= 4:
            return " * ".join([base] * int(exponent.value))
        self.functions.add("power")
        return f"power({args[0]}, {args[1]})"


def literal(node: Expr) -> str:
    """A constant as Triton text; floats are rounded to float32 first."""
    if node.dtype != E.FLOAT:
        return f"({node.value})" if node.dtype == E.INT and node.value < 0 else repr(node.value)
    with np.errstate(over="ignore"):
        value = float(np.float32(node.value))
    if not math.isfinite(value):
        return f'float("{value}")'
    return f"({value!r})" if math.copysign(1.0, value) < 0 else repr(value)


def _dtype(node: Expr, integer: str) -> str:
    return {E.FLOAT: "tl.float32", E.BOOL: "tl.int1"}.get(node.dtype, integer)


def _tiny(node: Expr) -> bool:
    """Whether Triton would take a float constant for a float64."""
    return node.op == "const" and node.dtype == E.FLOAT and 0 < abs(node.value) < 2.0**-126


def masked(lines: Iterable[str], mask: str | None) -> list[str]:
    """Statements with their loads masked, or not."""
    fill = f", mask={mask}, other=0" if mask else ""
    return [line.replace(MASKED, fill) for line in lines]


def live(lines: Iterable[str], roots: Iterable[str]) -> list[str]:
    """The statements that the texts in `roots` need."""
    needed = {word for root in roots for word in _WORD.findall(root)}
    kept = []
    for line in reversed(list(lines)):
        name, _, text = line.partition(" = ")
        if name in needed:
            needed.update(_WORD.findall(text))
            kept.append(line)
    return kept[::-1]


def operand_axes(operands: Iterable[Operand], leading: Iterable[str]
                 ) -> Callable[[str], tuple[str, ...]]:
    """`axes_of` for a printer: of the axes that there are, those along which an operand varies."""
    there = {*leading, "q", "k", "d"}
    found = {o.slot: tuple(a for a in o.axes or () if a in there) for o in operands}
    return lambda slot: found[slot]
