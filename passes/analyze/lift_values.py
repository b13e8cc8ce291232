"""Lifting rules of ops that make values: fills, positions, choices, comparisons, truth values."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.passes.analyze.lift import Bound, Index, Lifter, Unliftable
from attnopt.passes.analyze.lift_types import (
    as_type,
    cast,
    converted,
    dtype_of,
    pointwise,
    truth,
    typed,
    typed_leaf,
    whole_number,
)
from attnopt.passes.normalize import is_tensor, op_name

_ZERO = E.const(0)


# -- made from nothing ----------------------------------------------------------------------------
def filled(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    name = op_name(node)
    if "ones" in name or "zero" in name:
        value: Any = 1 if "ones" in name else 0
    else:
        value = a.values.get("fill_value", a.values.get("s", a.values.get("value")))
    if is_tensor(value):
        return cast(lift, lift.operand(value, ()), dtype_of(value), dtype_of(node))
    return cast(lift, E.wrap(lift.number(value)), None, dtype_of(node))


def arange(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    start, step = lift.number(a.get("start", 0)), lift.number(a.get("step", 1))
    pair = [whole_number(x) for x in (start, step)]
    if None in pair:
        raise Unliftable("steps that are no whole numbers")
    first, by = pair
    at = lift.logic.add(first, lift.logic.mul(by, idx[0]))  # type: ignore[arg-type]
    return cast(lift, at, torch.int64, dtype_of(node))


def eye(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    return cast(lift, lift.logic.compare("eq", *idx), torch.bool, dtype_of(node))


def triangle(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    end = lift.logic.add(idx[-2], lift.size(a.diagonal))
    inside = lift.logic.compare("le" if op_name(node) == "tril" else "ge", idx[-1], end)
    zero = E.const(converted(0, None, dtype_of(node)))
    if inside is E.FALSE:
        return zero
    return lift.logic.choose(inside, lift.element(a.self, idx), zero)


def cumsum(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    """The running sum of what is constant along the dimension."""
    if not idx:
        raise Unliftable("the sum of a scalar")
    dim = a.dim % len(idx)
    free = E.index("b999")
    each = lift.element(a.self, (*idx[:dim], free, *idx[dim + 1 :]))
    if "b999" in each.indices:
        raise Unliftable("a running sum of what varies")
    each = cast(lift, each, dtype_of(a.self), torch.int64 if kind_is_whole(a.self)
                else dtype_of(node))
    count = lift.logic.add(idx[dim], E.const(1))

    def leaf(x: Expr) -> Expr:
        whole = whole_number(x)
        if whole is None:
            raise Unliftable("a running sum of fractions")
        return as_type(lift, lift.logic.mul(whole, count), dtype_of(node))
    return lift.logic.spread(leaf, each)


def kind_is_whole(node: fx.Node) -> bool:
    return not dtype_of(node).is_floating_point


def one_hot(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    same = lift.logic.compare("eq", lift.element(a.self, idx[:-1]), idx[-1])
    return cast(lift, same, torch.bool, dtype_of(node))


# -- choices --------------------------------------------------------------------------------------
def where(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    if a.values.get("self") is None:
        raise Unliftable("positions of what is true")
    condition = truth(lift, lift.operand(a.condition, idx))
    sides = [typed(lift, x, idx, dtype_of(node)) if condition is not skipped else None
             for x, skipped in ((a.self, E.FALSE), (a.other, E.TRUE))]
    yes, no = (next(s for s in sides if s is not None) if x is None else x for x in sides)
    return lift.logic.choose(condition, yes, no)


def masked_fill(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    condition = truth(lift, lift.operand(a.mask, idx))
    value = typed(lift, a.value, idx, dtype_of(node))
    if condition is E.TRUE:
        return value
    return lift.logic.choose(condition, value, lift.operand(a.self, idx))


def index_put(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    """x[mask] = number."""
    source = a.values["values"]
    if a.accumulate or len(a.indices) != 1 or not is_tensor(a.indices[0]) \
            or dtype_of(a.indices[0]) != torch.bool or source.meta["val"].numel() != 1:
        raise Unliftable("written at computed places")
    mask = a.indices[0]
    condition = lift.element(mask, idx[: mask.meta["val"].dim()])
    value = typed(lift, source, (_ZERO,) * source.meta["val"].dim(), dtype_of(node))
    return lift.logic.choose(condition, value, lift.element(a.self, idx))


# -- comparisons and truth values -----------------------------------------------------------------
def comparison(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    op = {"less": "lt", "less_equal": "le", "greater": "gt", "greater_equal": "ge",
          "not_equal": "ne"}.get(op_name(node), op_name(node))
    pair = (a.self, a.other)
    common = _common(*pair)
    if common == torch.bool:
        return lift.logic.compare(op, *(lift.operand(x, idx) for x in pair))
    return pointwise(lift, node, idx, lambda x, y: lift.logic.compare(
        op, *(typed_leaf(lift, e, t, common) for e, t in zip((x, y), pair, strict=True))), pair)


def _common(*operands: Any) -> torch.dtype:
    """The type in which torch combines the operands."""
    def stand_in(x: Any) -> Any:
        if not isinstance(x, fx.Node):
            return x
        val = x.meta["val"]
        if not isinstance(val, torch.Tensor):
            return 0
        return torch.empty((1,) * min(val.dim(), 1), dtype=val.dtype, device="meta")
    return torch.result_type(*map(stand_in, operands))


def _booleans(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> list[Expr]:
    """Operands of a logical op, or of a bitwise op on truth values."""
    both = [a.self, a.other] if "other" in a.values else [a.self]
    if "logical" not in op_name(node):
        if dtype_of(node) != torch.bool:
            raise Unliftable("bits of whole numbers")
    return [truth(lift, lift.operand(x, idx)) for x in both]


def conjunction(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    return lift.logic.conj(*_booleans(lift, node, a, idx))


def disjunction(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    return lift.logic.disj(*_booleans(lift, node, a, idx))


def difference(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    return lift.logic.compare("ne", *_booleans(lift, node, a, idx))


def negation(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    return lift.logic.negate(_booleans(lift, node, a, idx)[0])


def finite_test(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    """isinf, isnan …: no whole number is."""
    def leaf(x: Expr) -> Expr:
        if whole_number(x) is None:
            raise Unliftable(f"{op_name(node)} of what varies")
        return E.const(op_name(node) == "isfinite")
    return pointwise(lift, node, idx, leaf)


# -- types and plain values -----------------------------------------------------------------------
def convert(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    """to, _to_copy, type_as, float …"""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return cast(lift, lift.element(source, idx), dtype_of(source), dtype_of(node))


def fill(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    return typed(lift, a.value, (), dtype_of(node))


VALUES = {
    **dict.fromkeys(("ones", "zeros", "full", "ones_like", "zeros_like", "full_like", "new_ones",
                     "new_zeros", "zero", "new_full", "scalar_tensor"), filled),
    **dict.fromkeys(("tril", "triu"), triangle),
    **dict.fromkeys(("le", "lt", "ge", "gt", "eq", "ne", "less", "less_equal", "greater",
                     "greater_equal", "not_equal"), comparison),
    **dict.fromkeys(("bitwise_and", "logical_and", "__and__"), conjunction),
    **dict.fromkeys(("bitwise_or", "logical_or", "__or__"), disjunction),
    **dict.fromkeys(("bitwise_xor", "logical_xor", "__xor__"), difference),
    **dict.fromkeys(("bitwise_not", "logical_not"), negation),
    **dict.fromkeys(("isinf", "isnan", "isneginf", "isposinf", "isfinite"), finite_test),
    **dict.fromkeys(("to", "_to_copy", "type_as", "float", "double", "half", "long", "int",
                     "bool"), convert),
    "arange": arange, "eye": eye, "cumsum": cumsum, "one_hot": one_hot, "where": where,
    "masked_fill": masked_fill, "index_put": index_put, "fill": fill,
}
