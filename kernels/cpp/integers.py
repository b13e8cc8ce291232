"""How large the integers of a kernel can become: inside of it they have 32 bits."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.spec import Spec, leading_axes

LARGEST = 2**31 - 1
#: of a float that is made an int, of which nothing is known
_UNKNOWN = 2**26


def fits(spec: Spec, leads: Sequence[int], queries: int, keys: int, value_dim: int,
         operands: Sequence[Tensor]) -> bool:
    """Whether no integer of the Spec's expressions can leave 32 bits at these lengths."""
    lengths = (*zip(leading_axes(len(leads)), leads, strict=True), ("q", queries), ("k", keys),
               ("d", value_dim))
    return _bound(spec, lengths, values_of(spec, operands)) <= LARGEST


def values_of(spec: Spec, operands: Sequence[Tensor]) -> tuple[tuple[str, int], ...]:
    """Whole-number operands, and what no entry of them exceeds."""
    return tuple((o.slot, _largest(t)) for o, t in zip(spec.operands, operands, strict=True)
                 if not t.is_floating_point() and t.dtype != torch.bool)


def _largest(tensor: Tensor) -> int:
    """The next power of two of the largest magnitude, so that few bounds are computed."""
    if not tensor.numel():
        return 0
    low, high = (int(n) for n in tensor.aminmax())
    return 1 << max(abs(low), abs(high)).bit_length()


@functools.lru_cache(maxsize=4096)
def _bound(spec: Spec, lengths: tuple[tuple[str, int], ...],
           values: tuple[tuple[str, int], ...]) -> int:
    exprs = (spec.logits, spec.mask.predicate(), spec.weights, spec.output, spec.groups, spec.sinks)
    return max(magnitude(e, dict(lengths), dict(values)) for e in exprs if e is not None)


def magnitude(expr: Expr, lengths: Mapping[str, int], values: Mapping[str, int]) -> int:
    """No int in `expr` is larger than this, whatever its sign."""
    found: dict[Expr, int] = {}
    for node in expr.walk():
        if node.dtype == E.INT:
            found[node] = _of(node, [found.get(a, 1) for a in node.args], lengths, values)
    return max(found.values(), default=0)


def _of(node: Expr, args: list[int], lengths: Mapping[str, int], values: Mapping[str, int]) -> int:
    match node.op:
        case "const":
            return abs(int(node.value))
        case "index" | "size":
            return lengths.get(node.value, 1)
        case "load":
            return values.get(node.value, 1)
        case "stat":
            return lengths["k"]
        case "add" | "sub":
            return sum(args)
        case "mul":
            return args[0] * args[1]
        case "int" | "floor" if node.args[0].dtype == E.FLOAT:
            return min(_UNKNOWN, _clamped(node.args[0]))
        case "mod":
            return args[1]
        case "where":
            return max(args[1:])
    return max(args, default=1)


def _clamped(e: Expr) -> int:
    """No number between the constants that a float is clamped to is larger, if it is."""
    ends: dict[str, int] = {}
    while e.op in ("minimum", "maximum") and e.args[1].op == "const":
        ends.setdefault(e.op, abs(e.args[1].value))
        e = e.args[0]
    return math.ceil(max(ends.values())) if len(ends) == 2 and all(
        map(math.isfinite, ends.values())) else _UNKNOWN
