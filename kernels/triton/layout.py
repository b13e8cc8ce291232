"""What the kernels of one Spec have in common: leading axes, pointers, arguments, loads of tiles.

A program of the grid works on one tile of one entry of the leading axes. It takes its number apart
into the indices h, b, b1 …; a tensor that does not vary along an axis simply has no stride for it,
so that heads which share keys read the same memory. Matrices come in through `load_rows`, or where
TMA is set through tensor descriptors of the leading axes, the rows and the channels, whose
hardware fills in zeros beyond the edges.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from attnopt.ir.expr import Expr
from attnopt.ir.spec import Spec
from attnopt.kernels.triton.functions import texts
from attnopt.kernels.triton.printer import Argument, TritonPrinter

#: part of the key of every generated file; to be raised when a change of text is not seen in it
VERSION = "1"

_HEADER = '''"""{title}

{spec}
"""
import triton
import triton.language as tl

'''
_LOAD_ROWS = '''
@triton.jit
def load_rows(at, first, stride, channel_stride, size, WHOLE: tl.constexpr, ROWS: tl.constexpr,
              WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """(ROWS, PADDED): rows from `first` on; 0 beyond WIDTH channels and, unless WHOLE, `size`."""
    row = tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, PADDED)[None, :]
    place = at + tl.cast(first, tl.int64) * stride + (row * stride + channel * channel_stride)
    if WHOLE and WIDTH == PADDED:
        tile = tl.load(place)
    elif WHOLE:
        tile = tl.load(place, mask=channel < WIDTH, other=0.0)
    elif WIDTH == PADDED:
        tile = tl.load(place, mask=row < size - first, other=0.0)
    else:
        tile = tl.load(place, mask=(row < size - first) & (channel < WIDTH), other=0.0)
    return tile
'''


@dataclass(frozen=True)
class Signature:
    """What of a call is in the text of its kernels.

    axes:       leading axes of the score in tensor order
    query, key, value: those of them along which each tensor varies
    wide:       indices and offsets need 64 bits
    lists:      leading axes along which lists of tiles vary; None where an interval rule does
    lse:        the log-sum-exp is stored too
    two_passes: the sum of the weights is found before they meet the values, although one pass
                would do (float16 would overflow)
    """

    axes: tuple[str, ...]
    query: tuple[str, ...]
    key: tuple[str, ...]
    value: tuple[str, ...]
    wide: bool = False
    lists: tuple[str, ...] | None = None
    lse: bool = False
    two_passes: bool = False


@dataclass(frozen=True, eq=False)
class Source:
    """A module's text and, for each kernel in it, the run-time arguments in order."""

    text: str
    arguments: dict[str, tuple[Argument, ...]]
    #: constexpr parameters of each kernel
    constants: dict[str, tuple[str, ...]]


class Kernel:
    """The text of one kernel while it is written."""

    def __init__(self, name: str, title: str, signature: Signature,
                 constants: Sequence[str]) -> None:
        self.name, self.title, self.signature = name, title, signature
        self.constants = tuple(constants)
        self.lines: list[str] = []
        self.arguments: dict[str, Argument] = {}
        self.functions: set[str] = set()

    def add(self, text: str | Iterable[str], depth: int = 0) -> None:
        """Append statements, each indented `depth` times."""
        lines = textwrap.dedent(text).strip("\n").split("\n") if isinstance(text, str) else text
        self.lines += ["    " * depth + line if line else "" for line in lines]

    def argument(self, name: str, kind: str, of: str = "", axis: str = "") -> str:
        self.arguments.setdefault(name, Argument(name, kind, of, axis))
        return name

    def uses(self, printer: TritonPrinter) -> None:
        """Take over what the expressions of a printer need."""
        for argument in printer.arguments.values():
            self.arguments.setdefault(argument.name, argument)
        self.functions |= printer.functions

    def size(self, axis: str) -> str:
        return self.argument(f"size_{axis}", "size", axis=axis)

    def indices(self, number: str, axes: Sequence[str]) -> None:
        """Take the number of an entry of `axes` apart into an index for each."""
        for i, axis in enumerate(reversed(axes)):
            if i == len(axes) - 1:
                self.add(f"{axis} = {number}")
            else:
                self.add(f"{axis} = {number} % {self.size(axis)}")
                self.add(f"{number} = {number} // {self.size(axis)}")

    def here(self, tensor: str, axes: Sequence[str]) -> str:
        """The pointer to this program's matrix (or vector) of a tensor."""
        pointer = self.argument(tensor, "pointer", tensor)
        terms = [f"tl.cast({a}, tl.int64) * "
                 + self.argument(f"{tensor}_stride_{a}", "stride", tensor, a) for a in axes]
        return " + ".join([pointer, *terms])

    def cells(self, printer: TritonPrinter, expr: Expr, shape: str = "(BM, BN)") -> str:
        """The value of an expression at every place of a tile, which it may not vary over."""
        name = printer(expr)
        if printer.levels[expr] == "cell":
            return name
        return f"tl.broadcast_to(tl.cast({name}, tl.float32), {shape})"

    def stride(self, tensor: str, axis: str) -> str:
        return self.argument(f"{tensor}_stride_{axis}", "stride", tensor, axis)

    def tile(self, name: str, tensor: str, axes: Sequence[str], row: str, first: str, whole: bool,
             rows: str, width: str, descriptor: bool = True, depth: int = 0) -> None:
        """Load rows of a matrix under a name; `row` is the axis of its rows, q or k."""
        load = (f"load_rows({tensor}_here, {first}, {self.stride(tensor, row)}, "
                f"{self.stride(tensor, 'd')}, {self.size(row)}, {whole}, {rows}, {width}, "
                f"{width}P)")
        if not descriptor:
            self.add(f"{name} = {load}", depth)
            return
        places = ", ".join([*axes, first, "0"])
        self.add(["if TMA:",
                  f"    {name} = tl.reshape({tensor}.load([{places}]), ({rows}, {width}P))",
                  "else:", f"    {name} = {load}"], depth)

    def text(self) -> str:
        names = [*self.arguments, *(f"{c}: tl.constexpr" for c in self.constants)]
        head = textwrap.fill(", ".join(names), 94, initial_indent=" " * 8,
                             subsequent_indent=" " * 8, break_long_words=False)
        body = textwrap.indent("\n".join(self.lines), "    ")
        return (f"\n@triton.jit\ndef {self.name}(\n{head},\n):\n"
                f'    """{self.title}"""\n{body}\n')


def module(title: str, spec: Spec, kernels: Sequence[Kernel]) -> Source:
    """The source of several kernels."""
    functions = {name for kernel in kernels for name in kernel.functions}
    spec_text = "\n".join(textwrap.wrap(
        str(spec).replace("\\", "\\\\").replace('"""', "'''"), 96, break_on_hyphens=False))
    text = _HEADER.format(title=title, spec=spec_text) + texts(functions) + _LOAD_ROWS
    text += "".join(kernel.text() for kernel in kernels)
    return Source(text, {k.name: tuple(k.arguments.values()) for k in kernels},
                  {k.name: k.constants for k in kernels})
