"""Types and constants in the lift: casts, truth values, and any pointwise op on constant leaves.

Where all leaves of the operands are constants the op itself is run on them, in the author's types,
so that every pointwise op is exact. Where a leaf varies, whole numbers keep being whole numbers as
long as the author's type holds them, and everything else is `Unliftable`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.passes.analyze.by_value import logic_limit
from attnopt.passes.analyze.lift import Bound, Index, Lifter, Unliftable
from attnopt.passes.normalize import is_tensor, op_name

_ZERO = E.const(0)
Leaf = Callable[..., Expr]


# -- types ----------------------------------------------------------------------------------------
def dtype_of(node: fx.Node) -> torch.dtype:
    return node.meta["val"].dtype  # type: ignore[no-any-return]


def cases(e: Expr) -> Expr:
    """A truth value as a case tree, so that `spread` reaches into it."""
    if e.dtype != E.BOOL or e.op in ("const", "where"):
        return e
    return Expr("where", (e, E.TRUE, E.FALSE), None, E.BOOL)


def spread(lift: Lifter, fn: Leaf, *operands: Expr) -> Expr:
    return lift.logic.spread(fn, *map(cases, operands))


@functools.lru_cache(maxsize=4096)
def converted(value: Any, source: torch.dtype | None, to: torch.dtype) -> Any:
    new = torch.tensor(value, dtype=source).to(to).item()
    return new + 0.0 if isinstance(new, float) else new


def cast(lift: Lifter, e: Expr, source: torch.dtype | None, to: torch.dtype) -> Expr:
    """`e` of type `source` (None: a Python number) converted as torch converts it."""
    if to == torch.bool:
        return truth(lift, e)
    if source == to:
        return e
    return spread(lift, lambda x: _cast_leaf(lift, x, source, to), e)


def _cast_leaf(lift: Lifter, x: Expr, source: torch.dtype | None, to: torch.dtype) -> Expr:
    if x.op == "const":
        return E.const(converted(x.value, source, to))
    if to.is_complex:
        raise Unliftable("complex numbers have no index function")
    if x.dtype == E.INT:
        return as_type(lift, x, to)
    if to.is_floating_point:
        if x.op == "float" and x.args[0].dtype == E.INT:
            return as_type(lift, x.args[0], to)
        if source is not None and _holds(source, to):
            return x
        raise Unliftable(f"rounded to {to}")
    if x.op == "float" and x.args[0].dtype == E.INT:
        return as_type(lift, x.args[0], to)
    return as_type(lift, E.call("int", x), to)


def _holds(source: torch.dtype, to: torch.dtype) -> bool:
    return source == to or torch.promote_types(source, to) == to


def as_type(lift: Lifter, x: Expr, to: torch.dtype) -> Expr:
    """A whole number in type `to`, if that holds all its values."""
    low, high = lift.logic.bounds(x)
    # A load is taken to fit its own type; int64 holds every index and every product of lengths.
    if to == torch.int64:
        return x
    limit = logic_limit(to)
    least = torch.iinfo(to).min if not to.is_floating_point else -limit
    if low < least or high > limit:
        raise Unliftable(f"whole numbers beyond what {to} holds")
    return E.call("float", x) if to.is_floating_point else x


def truth(lift: Lifter, e: Expr) -> Expr:
    """e != 0."""
    if e.dtype == E.BOOL and e.op != "where":
        return e
    return lift.logic.spread(
        lambda x: x if x.dtype == E.BOOL else lift.logic.compare(
            "ne", x, _ZERO if x.dtype == E.INT else E.const(0.0)), e)


def whole_number(e: Expr) -> Expr | None:
    """The int behind a float leaf that is a whole number."""
    if e.dtype == E.INT:
        return e
    if e.op == "float" and e.args[0].dtype == E.INT:
        return e.args[0]
    if e.op == "const" and isinstance(e.value, float) and math.isfinite(e.value) \
            and e.value == int(e.value):
        return E.const(int(e.value))
    return None


# -- the op itself on constants -------------------------------------------------------------------
@functools.lru_cache(maxsize=8192)
def _run(target: Any, given: tuple[Any, ...], names: tuple[str, ...]) -> Any:
    """The op on constants; `given` holds numbers, or (number, dtype, rank) for tensors."""
    def argument(x: Any) -> Any:
        if isinstance(x, tuple):
            value, dtype, rank = x
            return torch.full((1,) * min(rank, 1), value, dtype=dtype)
        return x
    values = [argument(x) for x in given]
    split = len(values) - len(names)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return target(*values[:split], **dict(zip(names, values[split:], strict=True)))


def fold(node: fx.Node, constants: dict[fx.Node, Expr]) -> Expr:
    """The value of a pointwise op whose tensor and size arguments are constants."""
    given: list[Any] = []
    for x in (*node.args, *node.kwargs.values()):
        if isinstance(x, fx.Node):
            value = constants[x].value
            val = x.meta["val"]
            given.append((value, val.dtype, val.dim()) if is_tensor(x) else value)
        elif isinstance(x, list):
            raise Unliftable("not a plain operand")
        else:
            given.append(x)
    try:
        made = _run(node.target, tuple(given), tuple(node.kwargs))
    except (RuntimeError, TypeError) as why:
        raise Unliftable(f"cannot be run on constants ({type(why).__name__})") from None
    if made.numel() != 1:
        raise Unliftable("not pointwise")
    number = made.to(dtype_of(node)).item()
    return E.const(number + 0.0 if isinstance(number, float) else number)


def pointwise(lift: Lifter, node: fx.Node, idx: Index, leaf: Leaf | None = None,
              operands: Sequence[Any] | None = None) -> Expr:
    """Any pointwise op: folded where all leaves are constants, else `leaf(*leaves)`.

    `operands` are the arguments that `leaf` takes, numbers among them; all tensors and sizes if
    not given. What folds is the op itself, with numbers as the author gave them.
    """
    flat = (*node.args, *node.kwargs.values())
    if operands is None:
        operands = [x for x in flat if isinstance(x, fx.Node)]

    def at(*leaves: Expr) -> Expr:
        if all(x.op == "const" for x in leaves):
            pairs = zip(operands, leaves, strict=True)
            return fold(node, {n: x for n, x in pairs if isinstance(n, fx.Node)})
        if leaf is None:
            raise Unliftable(f"{op_name(node)} of what varies")
        return leaf(*leaves)
    return spread(lift, at, *(lift.operand(x, idx) for x in operands))


def fold_pointwise(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    """The rule of ops that have none: pointwise ones on constants."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.pointwise not in target.tags \
            or torch.Tag.nondeterministic_seeded in target.tags \
            or not isinstance(node.meta.get("val"), torch.Tensor):
        raise Unliftable(f"no rule for {op_name(node)}")
    return pointwise(lift, node, idx)


def typed(lift: Lifter, x: Any, idx: Index, to: torch.dtype) -> Expr:
    return cast(lift, lift.operand(x, idx), dtype_of(x) if is_tensor(x) else None, to)


def typed_leaf(lift: Lifter, e: Expr, x: Any, to: torch.dtype) -> Expr:
    return cast(lift, e, dtype_of(x) if is_tensor(x) else None, to)
