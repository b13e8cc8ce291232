"""Masks that are part of a computed operand: read off a case tree, and put into a Spec's mask.

An additive operand such as `where(k <= q, bias, -inf)` is a mask and a bias; as a mask it lets a
kernel skip whole tiles. A truth value replaces the operand that a mask loads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.mask import ALL, And, Mask, Where
from attnopt.passes.analyze.lift import Unliftable
from attnopt.passes.analyze.logic import Logic
from attnopt.passes.analyze.structure import LOW


@dataclass(frozen=True)
class Computed:
    """An operand as an expression: `expr` where `keep` holds and `fill`, or something with `fill`
    added to it, elsewhere; without a fill it is `expr`. `blind`: rows without a key
    keep all of them, with the fill."""

    expr: Expr
    keep: Expr = E.TRUE
    fill: float | None = None
    blind: bool = False


def is_added(e: Expr, slot: str) -> bool:
    """Is the operand a term of a sum over the raw score?"""
    if e.op == "load":
        return e.value == slot and not e.args
    if e.op == "add":
        return any(is_added(a, slot) for a in e.args)
    if e.op in ("mul", "div") and e.args[1].op == "const" and 1e-3 <= e.args[1].value <= 1e3:
        return is_added(e.args[0], slot)
    return False


def is_term(e: Expr, slot: str) -> bool:
    """Is the operand a term of a sum over the raw score, without a factor?"""
    return e.op == "load" and e.value == slot and not e.args or (
        e.op == "add" and any(is_term(a, slot) for a in e.args))


def fill_of(e: Expr) -> float | None:
    """The low number that a leaf is, or that is added to it."""
    last = e.args[1] if e.op == "add" else e
    low = last.op == "const" and last.dtype == E.FLOAT and last.value <= LOW
    return last.value if low else None


def filled(logic: Logic, e: Expr) -> Computed | None:
    """A case tree of low leaves and of others, as a mask and the tree of the others."""
    if e.op != "where":
        return None
    condition, yes, no = e.args
    parts: list[tuple[Expr, float | None, Expr]] = []  # (keeps, fill, what is kept)
    for side in (yes, no):
        inner = filled(logic, side)
        fill = fill_of(side)
        if inner is not None:
            parts.append((inner.keep, inner.fill, inner.expr))
        elif fill is not None:
            parts.append((E.FALSE, fill, side))
        else:
            parts.append((E.TRUE, None, side))
    kept = [p for p in parts if p[0] is not E.FALSE]
    fills = [p[1] for p in parts if p[1] is not None]
    if not fills or not kept:
        return None
    keep = logic.choose(condition, parts[0][0], parts[1][0])
    rest = kept[0][2] if len(kept) == 1 else logic.choose(condition, kept[0][2], kept[1][2])
    return Computed(rest, keep, max(fills))


def in_mask(mask: Mask, slot: str, new: Expr, lifted: Expr, logic: Logic,
            named: Callable[[Expr], Mask]) -> Mask:
    """A mask with `new` in place of an operand; it is `lifted` with its loads as operands. Where
    the operand or its negation is all there is, `named` makes the Mask of what was lifted."""
    if slot not in mask.slots:
        return mask
    if isinstance(mask, And):
        found: Mask = ALL
        for m in mask.masks:
            found = found & in_mask(m, slot, new, lifted, logic, named)
        return found
    if not isinstance(mask, Where):
        raise Unliftable(f"part of a {mask.describe()} mask")
    keep = mask.expr
    if lifted.dtype == E.BOOL and keep.op == "load":
        return named(lifted)
    if lifted.dtype == E.BOOL and keep.op == "not" and keep.args[0].op == "load":
        return named(logic.negate(lifted))
    keep = keep.replace({n: new for n in keep.leaves if n.op == "load" and n.value == slot})
    if keep.op == "const":
        raise Unliftable("a mask that is the same everywhere")
    return Where(keep)
