"""Whether the integers of a kernel fit 32 bits, which are several times faster on a GPU.

An index is below its size, and sizes are known when a kernel is launched, so the largest absolute
value of every integer expression is, too. Integers that are loaded have any value of their type;
those of 64 bits widen what they meet by themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.spec import Spec

_LIMIT = 2**31 - 1
#: an int that was a float: a rank, a bucket, a place
_ROUNDED = 2**30


def needs_wide(spec: Spec, sizes: Mapping[str, int], operands: Mapping[str, Tensor]) -> bool:
    """Whether some index, or some offset within a head of an operand, may not fit 32 bits."""
    if any(_extent(t) > _LIMIT for t in operands.values()):
        return True
    kinds = tuple(sorted((slot, str(t.dtype)) for slot, t in operands.items()))
    return _wide(spec, tuple(sorted(sizes.items())), kinds)


def _extent(tensor: Tensor) -> int:
    return sum((n - 1) * abs(stride)
               for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


@functools.lru_cache(maxsize=4096)
def _wide(spec: Spec, sizes: tuple[tuple[str, int], ...], kinds: tuple[tuple[str, str], ...]
          ) -> bool:
    exprs = (spec.logits, spec.mask.predicate(), spec.weights, spec.output, spec.groups, spec.sinks)
    return any(largest(e, dict(sizes), dict(kinds)) > _LIMIT for e in exprs if e is not None)


def largest(expr: Expr, sizes: Mapping[str, int], dtypes: Mapping[str, str]) -> int:
    """The largest absolute value that an int anywhere in `expr` may have."""
    bound: dict[Expr, int] = {}
    for node in expr.walk():
        bound[node] = _bound(node, [bound[a] for a in node.args], sizes, dtypes)
    return max((b for n, b in bound.items() if n.dtype == E.INT), default=0)


def _bound(node: Expr, args: list[int], sizes: Mapping[str, int], dtypes: Mapping[str, str]) -> int:
    if node.dtype != E.INT:
        return 1
    match node.op:
        case "const":
            return abs(int(node.value))
        case "index" | "size":
            return sizes.get(node.value, 1)
        case "stat":
            return sizes.get("k", 1)
        case "load":
            if dtypes.get(node.value) == str(torch.int64):
                return 0
            return 2**31
        case "add" | "sub":
            return sum(args)
        case "mul":
            return args[0] * args[1]
        case "mod":
            return args[1]
        case "where":
            return max(args[1:])
        case "int" | "floor":
            return 1 if node.args[0].dtype == E.BOOL else _ROUNDED
    return max(args, default=0)


def inner_slots(exprs: Iterable[Expr | None]) -> frozenset[str]:
    """Operands that are the factors of a second product."""
    return frozenset(slot for e in exprs if e is not None for leaf in e.leaves
                     if leaf.op == "inner" for slot in leaf.value)
