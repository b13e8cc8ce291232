"""Lift a bias to the author's own float32 arithmetic over indices.

`Lifter` gives exact values and refuses what rounds. `FloatLifter` goes on where that ends: an op
on float32 that varies along both queries and keys becomes the same operation of `Expr`, on the same
arguments, so that a kernel that evaluates it in float32 differs by no more than the contraction of
a product and a sum. Arithmetic in other types rounds differently and is left alone, and what is
rounded is never compared, truncated or used as an index. What does not vary along both stays what
it is for `Lifter`: a load of the tensor that the author computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.passes.analyze import lift_tables
from attnopt.passes.analyze.key_lifetimes import is_choice
from attnopt.passes.analyze.lift import Bound, Index, Lifter, Unliftable, bind
from attnopt.passes.analyze.lift_contractions import CONTRACTIONS, contract
from attnopt.passes.analyze.lift_types import dtype_of, pointwise, typed_leaf, whole_number
from attnopt.passes.analyze.selections import is_block_table
from attnopt.passes.normalize import is_tensor, op_name

_BOTH = frozenset("qk")
#: whole numbers with infinite bounds hold so many terms at most: 32 bits hold their sum
_TERMS = 3
#: views, behind which a table has its own shape
_THROUGH = frozenset(("unsqueeze", "squeeze", "transpose", "permute", "expand", "alias", "clone",
                      "contiguous", "slice", "select"))
#: from here on every float32 is a whole number
_WHOLE = 2.0**24
Rule = Callable[["FloatLifter", fx.Node, Bound, Index], Expr]


class FloatLifter(Lifter):
    """A Lifter that keeps float32 arithmetic along both queries and keys.

    factors: the tensors of low-rank terms by name, with their indices; d is the one summed over
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.factors: dict[str, tuple[fx.Node, Index]] = {}

    def _element(self, node: fx.Node, idx: Index) -> Expr:
        both = _along_both(idx)
        if node.op == "call_function" and op_name(node) == "detach" \
                and self.values.sources(node) is None:
            if both:
                raise Unliftable(f"{node.name}: detached from what it is made of")
            return self.load(node, idx)
        if both and node.op == "call_function" and self.values.sources(node) is None and (
                is_choice(node, idx) or op_name(node) not in _THROUGH
                and is_block_table(self, node, idx)):
            return self.load(node, idx)  # a small table, or what `key_lifetimes` reads
        try:
            return super()._element(node, idx)
        except Unliftable as why:
            rule = _RULES.get(op_name(node)) if node.op == "call_function" else None
            if rule is None or not both or node.meta.get("attnopt_opaque"):
                raise
            if dtype_of(node) != torch.float32 and op_name(node) not in CONTRACTIONS:
                raise Unliftable(f"{node.name}: {op_name(node)} of {dtype_of(node)}") from why
        try:
            return rule(self, node, bind(node), idx)
        except LookupError as why:
            raise Unliftable(str(why) if ":" in str(why) else f"{node.name}: {why}") from None

    def _by_value(self, node: fx.Node, idx: Index) -> Expr | None:
        """Values only of what varies along both, and of the program's own literals: everything
        else is as cheap to load, and then needs no guard."""
        if not _along_both(idx):
            sources = self.values.sources(node)
            if sources is None or any(i.indices for i in idx) or any(
                    self.kind_of.get(s) != "constant" for s in sources):
                return None
        return super()._by_value(node, idx)

    def _named_table(self, table: Tensor, idx: Index) -> Expr | None:
        """What a kernel evaluates is the mask's own predicate, or a look-up of blocks."""
        found = super()._named_table(table, idx)
        if found is not None:
            return self.values.patterns.expand(found)
        return lift_tables.fit_blocks(self.values.patterns, table, idx, self.logic.lengths)

    def float32(self, e: Expr, x: Any) -> Expr:
        """A leaf of argument `x` as torch converts it to float32."""
        try:
            return typed_leaf(self, e, x, torch.float32)
        except Unliftable:
            if e.dtype == E.INT and self._short(e):
                return E.call("float", e)  # rounded as torch rounds it
            raise

    def _short(self, e: Expr) -> bool:
        """A sum of few loads, indices and lengths, or its absolute value."""
        poly = self.logic.poly(e)
        return len(poly) <= _TERMS and all(
            not m or len(m) == 1 and abs(c) == 1 and (
                m[0].op in ("load", "index", "size")
                or m[0].op == "abs" and self._short(m[0].args[0]))
            for m, c in poly.items())


def _along_both(idx: Index) -> bool:
    return frozenset().union(*(i.indices for i in idx)) >= _BOTH


def rounded(e: Expr) -> bool:
    """Is a float the result of arithmetic that rounds?"""
    return any(n.dtype == E.FLOAT and n.op not in ("const", "load", "float", "where", "neg", "abs",
                                                    "minimum", "maximum")
               for n in e.walk())


def decides(e: Expr) -> bool:
    """Does a whole number or a truth value in `e` depend on something rounded?"""
    return any(n.dtype != E.FLOAT and any(a.dtype == E.FLOAT and rounded(a) for a in n.args)
               for n in e.walk())


# -- rules ----------------------------------------------------------------------------------------
def _pointwise(fn: Callable[..., Expr], *names: str) -> Rule:
    """fn of the arguments with these names, in float32."""
    def rule(lift: FloatLifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
        given = [a.values.get(n) for n in names]
        if None in given or a.get("approximate", "none") != "none":
            raise Unliftable(f"another form of {op_name(node)}")

        def leaf(*leaves: Expr) -> Expr:
            return fn(*(lift.float32(e, x) for e, x in zip(leaves, given, strict=True)))
        return pointwise(lift, node, idx, leaf, given)
    return rule


def _call(op: str) -> Callable[..., Expr]:
    return lambda *args: E.call(op, *args)


def _sum(op: str, swap: bool = False) -> Rule:
    """x + alpha * y, x - alpha * y, y - alpha * x."""
    def rule(lift: FloatLifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
        alpha = a.get("alpha", 1)
        if not isinstance(alpha, int | float):
            raise Unliftable("scaled by a size")

        def fn(x: Expr, y: Expr) -> Expr:
            x, y = (y, x) if swap else (x, y)
            return E.call(op, x, y if alpha == 1 else E.call("mul", y, float(alpha)))
        return _pointwise(fn, "self", "other")(lift, node, a, idx)
    return rule


def _division(lift: FloatLifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    if a.get("rounding_mode"):
        raise Unliftable("a rounded quotient")

    def quotient(*given: Expr) -> Expr:
        *numerator, divisor = given
        if not _has_sign(lift, divisor):
            raise Unliftable("a divisor that may be a zero of either sign")
        return E.call("div", numerator[0] if numerator else 1.0, divisor)
    names = ("self",) if op_name(node) == "reciprocal" else ("self", "other")
    return _pointwise(quotient, *names)(lift, node, a, idx)


def _has_sign(lift: FloatLifter, y: Expr) -> bool:
    """Integer arithmetic has no -0.0: a divisor made of it must not be zero."""
    whole = whole_number(y)
    if whole is None:
        return y.op == "load" or y.op == "const" and y.value != 0 or y.op in ("exp", "exp2")
    low, high = lift.logic.bounds(whole)
    return low > 0 or high < 0 or lift.logic.nonneg(lift.logic.sub(whole, E.const(1)))


def _power(lift: FloatLifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    exponent, base = a.get("exponent"), a.values.get("self")
    if is_tensor(base) and exponent in (0.5, 1, 2, 3):
        def power(x: Expr) -> Expr:
            if exponent == 0.5:
                return E.call("sqrt", x)
            return x if exponent == 1 else x * x if exponent == 2 else x * x * x
        return _pointwise(power, "self")(lift, node, a, idx)
    if isinstance(base, int | float) and base > 0:
        number = float(base)

        def raised(x: Expr) -> Expr:
            return E.call("exp2", x) if number == 2 else E.call("pow", number, x)
        return _pointwise(raised, "exponent")(lift, node, a, idx)
    raise Unliftable("a power of what varies")


def _clamp(lift: FloatLifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    ends = {"clamp_min": ("min",), "clamp_max": ("max",)}.get(
        op_name(node), tuple(n for n in ("min", "max") if a.values.get(n) is not None))

    def fn(x: Expr, *bounds: Expr) -> Expr:
        for end, bound in zip(ends, bounds, strict=True):
            x = E.call("maximum" if end == "min" else "minimum", x, bound)
        return x
    return _pointwise(fn, "self", *ends)(lift, node, a, idx)


def _whole(x: Expr, up: bool) -> Expr:
    """floor(x), or ceil(x) = -floor(-x); what is larger than 2**24 is whole, infinite or nan."""
    rounded = E.call("floor", E.call("neg", x) if up else x)
    return E.where(E.call("lt", E.call("abs", x), _WHOLE),
                   E.call("float", E.call("neg", rounded) if up else rounded), x)


def _outer(lift: FloatLifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    return _product(lift, [(a.self, idx[:1]), (a.vec2, idx[1:])])


def _einsum(lift: FloatLifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    """A product without a contraction, as in "h,qk->hqk", or with one."""
    if dtype_of(node) != torch.float32:
        return contract(lift, node, a, idx)
    inputs, arrow, output = a.equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    plain = arrow and "." not in a.equation and all(
        len(set(t)) == len(t) for t in (*terms, output)) and set(output) == set("".join(terms))
    if not plain or len(terms) != len(a.tensors):
        return contract(lift, node, a, idx)
    place = dict(zip(output, idx, strict=True))
    return _product(lift, [(x, tuple(place[c] for c in term))
                           for x, term in zip(a.tensors, terms, strict=True)])


def _product(lift: FloatLifter, factors: list[tuple[fx.Node, Index]]) -> Expr:
    """The product of two elements (a product of more has an order that einsum chooses)."""
    if len(factors) != 2:
        raise Unliftable("a product of more than two")
    elements = [lift.element(node, own) for node, own in factors]

    def leaf(*leaves: Expr) -> Expr:
        return E.call("mul", *(lift.float32(e, node)
                               for e, (node, _) in zip(leaves, factors, strict=True)))
    return lift.logic.spread(leaf, *elements)


def _convert(lift: FloatLifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    """A whole number to float32; between floating types something is lost."""
    source = node.args[0]
    if not is_tensor(source) or dtype_of(source).is_floating_point:
        raise Unliftable("rounded")
    return lift.logic.spread(lambda e: lift.float32(e, source), lift.element(source, idx))


_RULES: dict[str, Rule] = {
    **dict.fromkeys(CONTRACTIONS, contract),
    **dict.fromkeys(("add", "__add__"), _sum("add")),
    **dict.fromkeys(("sub", "subtract"), _sum("sub")), "rsub": _sum("sub", swap=True),
    **dict.fromkeys(("mul", "multiply"), _pointwise(_call("mul"), "self", "other")),
    **dict.fromkeys(("div", "true_divide", "divide", "reciprocal"), _division),
    **dict.fromkeys(("minimum", "min", "fmin"), _pointwise(_call("minimum"), "self", "other")),
    **dict.fromkeys(("maximum", "max", "fmax"), _pointwise(_call("maximum"), "self", "other")),
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max", "clip"), _clamp),
    **dict.fromkeys(("neg", "negative"), _pointwise(_call("neg"), "self")),
    **dict.fromkeys(("abs", "absolute"), _pointwise(_call("abs"), "self")),
    **{op: _pointwise(_call(op), "self") for op in (
        "exp", "exp2", "log", "log1p", "sqrt", "rsqrt", "tanh", "sigmoid", "relu", "cos", "sin",
        "erf")},
    "floor": _pointwise(lambda x: _whole(x, up=False), "self"),
    "ceil": _pointwise(lambda x: _whole(x, up=True), "self"),
    "square": _pointwise(lambda x: x * x, "self"), "pow": _power,
    **dict.fromkeys(("outer", "ger"), _outer), "einsum": _einsum,
    **dict.fromkeys(("to", "_to_copy", "type_as", "float"), _convert),
}
