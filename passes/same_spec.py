"""Two Specs compared: are they one attention but for names, order and rounding of numbers?

Sums and products are made flat and sorted, numbers are collected in front of products, a division
by a number is a product with its inverse, and a factor of a sum is one of its terms. Numbers are
alike within 1e-6 of each other: what is put in is verified on its values anyway.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.mask import ALL, And, Causal, Mask, Where
from attnopt.ir.spec import Operand, Spec
from attnopt.rules import Decline

_SAME = tuple(f for f in Spec.__dataclass_fields__
              if f not in ("logits", "mask", "operands", "compute", "empty_row", "output",
                           "weights", "sinks"))


def inverted(spec: Spec, slot: str) -> Spec:
    """The Spec of the negation of a bool operand."""
    def turn(node: Expr) -> Expr | None:
        return ~node if node.op == "load" and node.value == slot else None

    def of(mask: Mask) -> Mask:
        return Where(mask.expr.replace(turn)) if isinstance(mask, Where) else mask

    mask = spec.mask
    mask = And(tuple(map(of, mask.masks))) if isinstance(mask, And) else of(mask)
    return spec.with_(mask=mask, logits=spec.logits.replace(turn))


def same(pattern: Spec, site: Spec) -> tuple[dict[str, str], frozenset[str]]:
    """Slots of the site by those of the pattern, if both are one attention, and those of the site's
    that are the negation of the pattern's; or Decline."""
    masks = [o.slot for o in site.operands if o.dtype == E.BOOL]
    reason = None
    for count in range(len(masks) + 1):
        for turned in itertools.combinations(masks, count):
            form = site
            for slot in turned:
                form = inverted(form, slot)
            try:
                return _names(pattern, form), frozenset(turned)
            except Decline as no:
                reason = reason or no
    assert reason is not None
    raise reason


def _names(pattern: Spec, site: Spec) -> dict[str, str]:
    for name in _SAME:
        if getattr(pattern, name) != getattr(site, name):
            raise Decline(f"{name} is {getattr(site, name)!r}, its pattern has "
                          f"{getattr(pattern, name)!r}")
    if pattern.empty_row != site.empty_row and not (
            pattern.mask in (ALL, Causal()) and site.mask in (ALL, Causal())):
        raise Decline(f"a row without keys is {site.empty_row}, its pattern has "
                      f"{pattern.empty_row}")
    if len(pattern.operands) != len(site.operands):
        raise Decline(f"{len(site.operands)} operands beside query, key and value, its pattern has "
                      f"{len(pattern.operands)}")
    for order in itertools.permutations(site.operands):
        names = {p.slot: s.slot for p, s in zip(pattern.operands, order, strict=True)}
        pairs = zip(pattern.operands, order, strict=True)
        if all(_fits(p, s) for p, s in pairs) and _equal(pattern, site, names):
            return names
    raise Decline(f"its logits or mask are others: {site.logits}, {site.mask}; the pattern has "
                  f"{pattern.logits}, {pattern.mask}")


def _fits(pattern: Operand, site: Operand) -> bool:
    if pattern.axes is None or site.axes is None:
        return pattern.axes == site.axes and pattern.dtype == site.dtype
    return pattern.dtype == site.dtype


def _equal(pattern: Spec, site: Spec, names: Mapping[str, str]) -> bool:
    mask = re.sub(r"[A-Za-z_]\w*", lambda word: names.get(word[0], word[0]), str(pattern.mask))
    if mask != str(site.mask):
        return False
    for name in ("logits", "weights", "output", "sinks"):
        mine, theirs = getattr(pattern, name), getattr(site, name)
        if (mine is None) != (theirs is None):
            return False
        if mine is not None and not _alike(_normal(mine, names), _normal(theirs, {})):
            return False
    return True


def _normal(node: Expr, names: Mapping[str, str]) -> tuple[Any, ...]:
    """A nested tuple: sums and products flat and sorted, numbers collected, div as mul."""
    if node.op == "const":
        return ("const", node.value)
    if node.op == "load":
        slot = names.get(node.value, node.value)
        return ("load", slot, *(_normal(a, names) for a in node.args))
    if node.op in ("mul", "div", "neg"):
        factor, rest = _product(node, names)
        scaled = ("const", factor)
        return scaled if not rest else rest[0] if factor == 1 and len(rest) == 1 else (
            "mul", scaled, *rest)
    if node.op in ("add", "sub"):
        return ("add", *sorted(_sum(node, names, 1.0), key=_shape))
    args = [_normal(a, names) for a in node.args]
    return (node.op, node.value, *(sorted(args, key=_shape) if node.op in E._COMMUTATIVE else args))


def _product(node: Expr, names: Mapping[str, str]) -> tuple[float, list[tuple[Any, ...]]]:
    if node.op == "const" and not isinstance(node.value, bool):
        return float(node.value), []
    if node.op == "neg":
        factor, rest = _product(node.args[0], names)
        return -factor, rest
    if node.op == "mul" or (node.op == "div" and node.args[1].op == "const"
                            and node.args[1].value):
        left, one = _product(node.args[0], names)
        right, two = _product(node.args[1], names)
        factor = left * right if node.op == "mul" else left / right
        return factor, sorted(one + two, key=_shape)
    if node.op == "div":
        left, one = _product(node.args[0], names)
        return left, [*one, ("inverse", _normal(node.args[1], names))]
    return 1.0, [_normal(node, names)]


def _sum(node: Expr, names: Mapping[str, str], sign: float) -> list[tuple[Any, ...]]:
    if node.op in ("add", "sub"):
        turned = sign if node.op == "add" else -sign
        return _sum(node.args[0], names, sign) + _sum(node.args[1], names, turned)
    if node.op in ("mul", "div"):
        factor, rest = _product(node, names)
        if len(rest) == 1 and rest[0][0] == "add":  # s * (a + b)
            return [_times(part, factor * sign) for part in rest[0][1:]]
    return [_times(_normal(node, names), sign)]


def _times(part: tuple[Any, ...], factor: float) -> tuple[Any, ...]:
    if part[0] == "const":
        return ("const", part[1] * factor)
    if part[0] == "mul" and part[1][0] == "const":
        number = part[1][1] * factor
        return part[2] if number == 1 and len(part) == 3 else ("mul", ("const", number), *part[2:])
    return part if factor == 1 else ("mul", ("const", factor), part)


def _shape(part: tuple[Any, ...]) -> str:
    """What to sort by: everything but the numbers, then the numbers."""
    def bare(x: Any) -> str:
        if isinstance(x, tuple):
            return "#" if x[:1] == ("const",) else f"({' '.join(map(bare, x))})"
        return str(x)
    return f"{bare(part)} {part}"


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, float) or isinstance(b, float):
        numbers = all(isinstance(x, (int, float)) for x in (a, b))
        return numbers and (a == b or math.isclose(a, b, rel_tol=1e-6))
    return bool(a == b)
