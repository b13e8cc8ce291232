"""How an index moves along neighbouring keys: what makes a table look-up a plain vector load.

A kernel computes the scores of W neighbouring keys at once, the first of which is a multiple of W.
An index of a table that is `k + row` steps from key to key, so that the look-up is one load of W
numbers; `k // c` is the same for all of them where c is a multiple of W, and the look-up is one
number. Everything else is gathered lane by lane.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr


@dataclass(frozen=True)
class Motion:
    """An int from one key to the next: plus `step`, within blocks of `block` keys (0: always)."""

    step: int
    block: int = 0

    def within(self, width: int) -> bool:
        """Does it hold for `width` keys from a multiple of `width` on?"""
        return self.block % width == 0


def motion(e: Expr, fixed: Callable[[Expr], bool], axis: str = "k") -> Motion | None:
    """The motion of an int along an axis; None where it has none that is known.

    fixed: tells of an expression that does not vary along the axis
    """
    if fixed(e):
        return Motion(0)
    if e is E.index(axis):
        return Motion(1)
    match e.op:
        case "floordiv" | "mod" if e.args[0] is E.index(axis) and e.args[1].op == "const" \
                and e.args[1].value > 0:
            return Motion(int(e.op == "mod"), e.args[1].value)
        case "add" | "sub" | "mul" | "minimum" | "maximum":
            sides = [motion(a, fixed, axis) for a in e.args]
            a, b = sides
            if a is None or b is None:
                return None
            block = math.gcd(a.block, b.block)
            if e.op in ("add", "sub"):
                return Motion(a.step + b.step if e.op == "add" else a.step - b.step, block)
            return Motion(0, block) if a.step == b.step == 0 else None
    return None


def look_up(indices: Iterable[Expr], width: int, fixed: Callable[[Expr], bool],
            axis: str = "k") -> str:
    """How `width` lanes read a row-major table at `indices`: "run", "same" or "gather"."""
    found = [motion(e, fixed, axis) for e in indices]
    if not found or any(m is None or not m.within(width) for m in found):
        return "gather"
    steps = [m.step for m in found if m is not None]
    if any(steps[:-1]) or steps[-1] not in (0, 1):
        return "gather"
    return "run" if steps[-1] else "same"
