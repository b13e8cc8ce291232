"""Lifting rules of ops that compute: constants, positions, arithmetic, comparisons, truth values.

Operands arrive as case trees. Where all leaves are constants the op itself is run on them, in the
author's types, so that every pointwise op is exact; where a leaf varies, whole numbers keep being
whole numbers as long as the author's type holds them, and everything else is `Unliftable`.
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
from attnopt.passes.by_value import logic_limit
from attnopt.passes.lift import Bound, Index, Lifter, Unliftable
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
def _converted(value: Any, source: torch.dtype | None, to: torch.dtype) -> Any:
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
        return E.const(_converted(x.value, source, to))
    if to.is_complex:
        raise Unliftable("complex numbers have no index function")
    if x.dtype == E.INT:
        return _as(lift, x, to)
    if to.is_floating_point:
        if x.op == "float" and x.args[0].dtype == E.INT:
            return _as(lift, x.args[0], to)
        if source is not None and _holds(source, to):
            return x
        raise Unliftable(f"rounded to {to}")
    if x.op == "float" and x.args[0].dtype == E.INT:
        return _as(lift, x.args[0], to)
    return _as(lift, E.call("int", x), to)


def _holds(source: torch.dtype, to: torch.dtype) -> bool:
    return source == to or torch.promote_types(source, to) == to


def _as(lift: Lifter, x: Expr, to: torch.dtype) -> Expr:
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


def _whole(e: Expr) -> Expr | None:
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
    pair = [_whole(x) for x in (start, step)]
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
    zero = E.const(_converted(0, None, dtype_of(node)))
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
        whole = _whole(x)
        if whole is None:
            raise Unliftable("a running sum of fractions")
        return _as(lift, lift.logic.mul(whole, count), dtype_of(node))
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
    sides = [_typed(lift, x, idx, dtype_of(node)) if condition is not skipped else None
             for x, skipped in ((a.self, E.FALSE), (a.other, E.TRUE))]
    yes, no = (next(s for s in sides if s is not None) if x is None else x for x in sides)
    return lift.logic.choose(condition, yes, no)


def _typed(lift: Lifter, x: Any, idx: Index, to: torch.dtype) -> Expr:
    return cast(lift, lift.operand(x, idx), dtype_of(x) if is_tensor(x) else None, to)


def masked_fill(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    condition = truth(lift, lift.operand(a.mask, idx))
    value = _typed(lift, a.value, idx, dtype_of(node))
    if condition is E.TRUE:
        return value
    return lift.logic.choose(condition, value, lift.operand(a.self, idx))


def index_put(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    """x[mask] = number."""
    if a.accumulate or len(a.indices) != 1 or not is_tensor(a.indices[0]) \
            or dtype_of(a.indices[0]) != torch.bool or math.prod(a.values_shape) != 1:
        raise Unliftable("written at computed places")
    mask = a.indices[0]
    condition = lift.element(mask, idx[: mask.meta["val"].dim()])
    one = tuple(_ZERO for _ in a.values_shape)
    value = cast(lift, lift.element(a.values_node, one), dtype_of(a.values_node), dtype_of(node))
    return lift.logic.choose(condition, value, lift.element(a.self, idx))


def _index_put(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    given = a.values["values"]
    extended = Bound({**a.values, "values_node": given, "values_shape": given.meta["val"].shape})
    return index_put(lift, node, extended, idx)


# -- comparisons and truth values -----------------------------------------------------------------
def comparison(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    op = {"less": "lt", "less_equal": "le", "greater": "gt", "greater_equal": "ge",
          "not_equal": "ne"}.get(op_name(node), op_name(node))
    pair = (a.self, a.other)
    common = _common(*pair)
    if common == torch.bool:
        return lift.logic.compare(op, *(lift.operand(x, idx) for x in pair))
    return pointwise(lift, node, idx, lambda x, y: lift.logic.compare(
        op, *(_typed_leaf(lift, e, t, common) for e, t in zip((x, y), pair, strict=True))), pair)


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
        if _whole(x) is None:
            raise Unliftable(f"{op_name(node)} of what varies")
        return E.const(op_name(node) == "isfinite")
    return pointwise(lift, node, idx, leaf)


# -- arithmetic -----------------------------------------------------------------------------------
def arithmetic(fn: Callable[..., Expr], neutral: int | None = None,
               logical: Callable[..., Expr] | None = None) -> Callable[..., Expr]:
    """A rule for a binary op: `fn` on whole numbers, `logical` where the result is a truth value,
    and x itself where the second operand is `neutral`."""
    def rule(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
        to, pair = dtype_of(node), (a.self, a.other)
        alpha = a.values.get("alpha", 1)
        if to == torch.bool:
            if logical is None:
                raise Unliftable("arithmetic of truth values")
            return logical(lift.logic, *(truth(lift, lift.operand(x, idx)) for x in pair))

        def leaf(x: Expr, y: Expr) -> Expr:
            x, y = (_typed_leaf(lift, e, t, to) for e, t in zip((x, y), pair, strict=True))
            if alpha != 1:
                raise Unliftable("a scaled operand")
            if neutral is not None:
                if y.op == "const" and y.value == neutral:
                    return x
                if x.op == "const" and x.value == neutral and op_name(node) in ("add", "mul"):
                    return y
            whole = _whole(x), _whole(y)
            if None in whole:
                raise Unliftable(f"{op_name(node)} of fractions")
            return _as(lift, fn(lift.logic, *whole), to)
        return pointwise(lift, node, idx, leaf, pair)
    return rule


def _typed_leaf(lift: Lifter, e: Expr, x: Any, to: torch.dtype) -> Expr:
    return cast(lift, e, dtype_of(x) if is_tensor(x) else None, to)


def _reversed_sub(logic: Any, x: Expr, y: Expr) -> Expr:
    return logic.sub(y, x)


def division(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    mode = a.values.get("rounding_mode")
    if op_name(node) == "floor_divide":
        mode = "floor"
    if mode is None:
        return arithmetic(_no_quotient, neutral=1)(lift, node, a, idx)
    exact = _floored if mode == "floor" else _truncated
    if dtype_of(node).is_floating_point:
        raise Unliftable("a rounded quotient of floats")
    return arithmetic(exact)(lift, node, a, idx)


def _no_quotient(logic: Any, x: Expr, y: Expr) -> Expr:
    raise Unliftable("a quotient that is rounded")


def _floored(logic: Any, x: Expr, y: Expr) -> Expr:
    return logic.floordiv(x, y)


def _truncated(logic: Any, x: Expr, y: Expr) -> Expr:
    if not logic.nonneg(x) or not logic.nonneg(y):
        raise Unliftable("a quotient of negative numbers, truncated")
    return logic.floordiv(x, y)


def remainder(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    def leaf(logic: Any, x: Expr, y: Expr) -> Expr:
        if op_name(node) == "fmod" and not (logic.nonneg(x) and logic.nonneg(y)):
            raise Unliftable("a remainder of negative numbers, truncated")
        return logic.mod(x, y)
    return arithmetic(leaf)(lift, node, a, idx)


def extreme(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    """minimum and maximum of two tensors."""
    if not is_tensor(a.values.get("other")):
        raise Unliftable("a reduction")
    least = op_name(node) in ("minimum", "min", "fmin")
    if dtype_of(node) == torch.bool:
        both = [truth(lift, lift.operand(x, idx)) for x in (a.self, a.other)]
        return (lift.logic.conj if least else lift.logic.disj)(*both)
    name = "minimum" if least else "maximum"
    return arithmetic(lambda logic, x, y: getattr(logic, name)(x, y))(lift, node, a, idx)


def clamp(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    """clamp, clamp_min, clamp_max with numbers or tensors as ends."""
    to = dtype_of(node)
    ends = {n: x for n in ("min", "max") if (x := a.values.get(n)) is not None}

    def leaf(x: Expr, *bounds: Expr) -> Expr:
        x = _typed_leaf(lift, x, a.self, to)
        for (end, given), bound in zip(ends.items(), bounds, strict=True):
            bound = _typed_leaf(lift, bound, given, to)
            if bound.op == "const" and math.isinf(bound.value) \
                    and (bound.value < 0) == (end == "min"):
                continue
            whole, limit = _whole(x), _whole(bound)
            if whole is None or limit is None:
                raise Unliftable("clamps fractions")
            pick = lift.logic.maximum if end == "min" else lift.logic.minimum
            x = _as(lift, pick(whole, limit), to)
        return x
    return pointwise(lift, node, idx, leaf, (a.self, *ends.values()))


def unary(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    """neg, abs, sign, square of whole numbers; floor and round leave them."""
    logic, name = lift.logic, op_name(node)

    def leaf(x: Expr) -> Expr:
        whole = _whole(x)
        if whole is None:
            raise Unliftable(f"{name} of what varies")
        match name:
            case "neg" | "negative":
                made = logic.neg(whole)
            case "abs" | "absolute":
                made = logic.abs(whole)
            case "square":
                made = logic.mul(whole, whole)
            case "sign":
                positive = logic.compare("lt", _ZERO, whole)
                below = logic.choose(logic.compare("eq", whole, _ZERO), _ZERO, E.const(-1))
                return cast(lift, logic.choose(positive, E.const(1), below), torch.int64,
                            dtype_of(node))
            case _:
                made = whole
        return _as(lift, made, dtype_of(node))
    return pointwise(lift, node, idx, leaf)


def power(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    if a.values.get("exponent") not in (1, 2) or not is_tensor(a.values.get("self")):
        return pointwise(lift, node, idx)

    def leaf(x: Expr) -> Expr:
        whole = _whole(x)
        if whole is None:
            raise Unliftable("a power of what varies")
        return _as(lift, whole if a.exponent == 1 else lift.logic.mul(whole, whole),
                   dtype_of(node))
    return pointwise(lift, node, idx, leaf)


def convert(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    """to, _to_copy, type_as, float …"""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return cast(lift, lift.element(source, idx), dtype_of(source), dtype_of(node))


def fill(lift: Lifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    return _typed(lift, a.value, (), dtype_of(node))


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
    **dict.fromkeys(("div", "true_divide", "divide", "floor_divide"), division),
    **dict.fromkeys(("remainder", "fmod"), remainder),
    **dict.fromkeys(("minimum", "maximum", "min", "max", "fmin", "fmax"), extreme),
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max", "clip"), clamp),
    **dict.fromkeys(("neg", "negative", "abs", "absolute", "sign", "square", "floor", "round",
                     "ceil", "trunc"), unary),
    **dict.fromkeys(("to", "_to_copy", "type_as", "float", "double", "half", "long", "int",
                     "bool"), convert),
    **dict.fromkeys(("add", "__add__"), arithmetic(
        lambda logic, x, y: logic.add(x, y), 0, lambda logic, x, y: logic.disj(x, y))),
    **dict.fromkeys(("mul", "multiply"), arithmetic(
        lambda logic, x, y: logic.mul(x, y), 1, lambda logic, x, y: logic.conj(x, y))),
    **dict.fromkeys(("sub", "subtract"), arithmetic(lambda logic, x, y: logic.sub(x, y), 0)),
    "rsub": arithmetic(_reversed_sub), "arange": arange, "eye": eye, "cumsum": cumsum,
    "one_hot": one_hot, "where": where, "masked_fill": masked_fill, "index_put": _index_put,
    "pow": power, "fill": fill,
}
