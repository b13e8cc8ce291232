"""Expr -> statements of a kernel language: the part that C++ and Triton share.

A printer walks expressions that share subexpressions and emits one assignment per node, once, at
the outermost loop level where it can be computed:

    "head"   depends on the leading axes only (slopes, scales, sizes)
    "row"    and on the query row
    "column" and on the key (in an output epilogue: on the value channel d), but not on the row
    "cell"   on both, or on the score itself

A language gives the text of leaves and of operations. `//` and `%` floor in Expr and truncate in
both languages; booleans, casts, minimum and maximum of NaN follow `attnopt.ir.evaluate`, and every
language is property-tested against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr

LEVELS = ("head", "row", "column", "cell")
#: leaves that exist for each (row, column) pair only
_CELL = ("score", "weight", "out", "value", "inner")


def level_of(axes: Iterable[str], column: str = "k") -> str:
    """The level of something that varies along these axes."""
    names = set(axes)
    if "q" in names:
        return "cell" if column in names else "row"
    return "column" if column in names else "head"


class Printer:
    """Prints expressions for one kernel; subclasses are languages.

    axes_of: axes along which a broadcast operand varies, by slot
    column:  "k" for scores and weights, "d" for an output epilogue
    """

    def __init__(self, axes_of: Callable[[str], Iterable[str]], column: str = "k") -> None:
        self.axes_of, self.column = axes_of, column
        self.lines: dict[str, list[str]] = {level: [] for level in LEVELS}
        self.names: dict[Expr, str] = {}
        self.levels: dict[Expr, str] = {}
        self.prefix = "v"

    def __call__(self, expr: Expr) -> str:
        """Emit what is missing of `expr`; the text of its value."""
        for node in expr.walk():
            if node not in self.names:
                self.levels[node] = level = self.level(node)
                self.names[node] = self.place(node, level, self.text(node))
        return self.names[expr]

    def given(self, leaf: Expr, name: str, level: str) -> None:
        """A value that the template already has under a name."""
        self.names[leaf], self.levels[leaf] = name, level

    def level(self, node: Expr) -> str:
        if node.op in _CELL:
            return "cell"
        if node.op == "stat":
            return "row"
        axes: set[str] = set()
        if node.op == "index":
            axes.add(node.value)
        elif node.op == "load" and not node.args:
            axes.update(self.axes_of(node.value))
        own = level_of(axes, self.column)
        return join(own, *(self.levels[a] for a in node.args))

    def place(self, node: Expr, level: str, text: str) -> str:
        """Keep `text` under a name at its level; constants stay where they are used."""
        if node.op == "const":
            return text
        name = f"{self.prefix}{sum(map(len, self.lines.values()))}"
        self.lines[level].append(self.assign(node, level, name, text))
        return name

    def text(self, node: Expr) -> str:
        args = [self.names[a] for a in node.args]
        if node.op in E._LEAVES:
            return self.leaf(node, args)
        return self.operation(node, args)

    # -- what a language says ---------------------------------------------------------------
    def assign(self, node: Expr, level: str, name: str, text: str) -> str:
        """The statement that gives `name` its value."""
        raise NotImplementedError

    def leaf(self, node: Expr, args: list[str]) -> str:
        """The text of a leaf that was not `given`."""
        raise NotImplementedError

    def operation(self, node: Expr, args: list[str]) -> str:
        """The text of an operation on its printed arguments."""
        raise NotImplementedError


def join(*levels: str) -> str:
    """The outermost level at which values of all these levels are known."""
    present = set(levels)
    if "cell" in present or {"row", "column"} <= present:
        return "cell"
    return "row" if "row" in present else "column" if "column" in present else "head"
