"""What the kernels of one Spec have in common: leading axes, pointers, arguments, loads of tiles.

A program of the grid works on one tile of one entry of the leading axes. It takes its number apart
into the indices h, b, b1 …; a tensor that does not vary along an axis simply has no stride for it,
so that heads which share keys read the same memory. Matrices come in through `load_rows`, or where
TMA is set through tensor descriptors of the leading axes, the rows and the channels, whose
hardware fills in zeros beyond the edges.

A tile is a run of tokens from `first` on (`there`, of the other axis), or a box of a grid: then
`rows` and `columns` are the tokens of its places in row-major order, and a place beyond the grid
has the number of all tokens, which is what every mask of an edge asks for.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from attnopt.ir.expr import Expr
from attnopt.ir.spec import Spec
from attnopt.kernels.triton import boxes
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
    grid:       axes of the grid of which tiles are boxes; 0 for runs of tokens
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
    grid: int = 0
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
        self.constants = (*constants, *boxes.names(signature.grid))
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

    def here(self, tensor: str, axes: Sequence[str], name: str = "") -> str:
        """The pointer to this program's matrix (or vector) of a tensor, passed under a name."""
        pointer = self.argument(name or tensor, "pointer", tensor)
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

    def tiles(self, axis: str) -> str:
        """How many tiles an axis has."""
        size, grid, letter = self.size(axis), self.signature.grid, axis.upper()
        if not grid:
            return f"tl.cdiv({size}, {'BM' if axis == 'q' else 'BN'})"
        inside = " * ".join(f"N{a}" for a in range(1, grid))
        counts = " * ".join(f"{letter}C{a}" for a in range(1, grid))
        return f"tl.cdiv({size} // ({inside}), {letter}B0) * ({counts})"

    def place(self, axis: str, first: str, number: str, depth: int = 0) -> None:
        """Name the tokens of a tile by its number: `rows` of q, `columns` of k, from `first` on."""
        grid, letter = self.signature.grid, axis.upper()
        name, count = ("rows", "BM") if axis == "q" else ("columns", "BN")
        if not grid:
            number = number if number.isidentifier() else f"({number})"
            self.add([f"{first} = {number} * {count}",
                      f"{name} = {first} + tl.arange(0, {count})"], depth)
            return
        later = range(1, grid)
        corner = ", ".join(self.corner(first))
        of_box = ", ".join([*(f"{letter}C{a}" for a in later),
                            *(f"{letter}B{a}" for a in range(grid))])
        inner = ", ".join([*(f"N{a}" for a in later), *(f"{letter}B{a}" for a in later)])
        self.add([f"{corner} = box_corner({number}, {of_box})",
                  f"{name} = box_tokens({corner}, {self.size(axis)}, {inner}, {count})"], depth)

    def corner(self, first: str) -> list[str]:
        """The names of the first coordinates of a box."""
        return [f"{first}{a}" for a in range(self.signature.grid)]

    def tile(self, name: str, tensor: str, axes: Sequence[str], row: str, first: str, whole: bool,
             rows: str, width: str, descriptor: bool = True, depth: int = 0) -> None:
        """Load rows of a matrix under a name; `row` is the axis of its rows, q or k."""
        if self.signature.grid:
            tokens = "rows" if row == "q" else "columns"
            load = (f"load_tokens({tensor}_here, {tokens}, {self.stride(tensor, row)}, "
                    f"{self.stride(tensor, 'd')}, {self.size(row)}, {whole}, {width}, {width}P)")
            entry = "0"
            for axis in axes:
                entry = axis if entry == "0" else f"({entry}) * {self.size(axis)} + {axis}"
            places = ", ".join([entry, *self.corner(first), "0"])
        else:
            load, places = self.run(tensor, row, first, whole, rows, width), ", ".join(
                [*axes, first, "0"])
        if not descriptor:
            self.add(f"{name} = {load}", depth)
            return
        self.add(["if TMA:",
                  f"    {name} = tl.reshape({tensor}.load([{places}]), ({rows}, {width}P))",
                  "else:", f"    {name} = {load}"], depth)

    def run(self, tensor: str, row: str, first: str, whole: bool, rows: str, width: str) -> str:
        """The text that loads rows from `first` on."""
        return (f"load_rows({tensor}_here, {first}, {self.stride(tensor, row)}, "
                f"{self.stride(tensor, 'd')}, {self.size(row)}, {whole}, {rows}, {width}, "
                f"{width}P)")

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
    grid = max(kernel.signature.grid for kernel in kernels)
    text = _HEADER.format(title=title, spec=spec_text) + texts(functions) + _LOAD_ROWS
    text += boxes.functions(grid)
    text += "".join(kernel.text() for kernel in kernels)
    return Source(text, {k.name: tuple(k.arguments.values()) for k in kernels},
                  {k.name: k.constants for k in kernels})
