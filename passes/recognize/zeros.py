"""Which tensors have entries that are exactly 0, and about how many: the gates of a router.

    one_hot(topk(p, k).indices).sum(-2)      k of n entries are 1, the others exactly 0
    p * mask,  p * mask / sum * k            0 where the mask is
    softmax(where(mask, p, -inf))            likewise: exp(-inf) is 0
    argmax(p).float(),  1 - it               one of two
    sigmoid(p),  p itself                    never 0: no such gate

`nonzero_share` reads this off the program. It is an expectation for the cost model and a reason to
look, never a proof: a kernel that leaves out what a gate multiplies by 0 compares the gate with 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnopt.passes.normalize import is_tensor, op_name
from attnopt.passes.recognize.axes import length
from attnopt.passes.recognize.contraction import contraction, reduced_dims
from attnopt.passes.recognize.layout import LAYOUT_OPS
from attnopt.passes.recognize.pointwise import is_cast
from attnopt.passes.recognize.program import SOFTMAX, Program

#: where nothing is known of how many entries a condition holds for
HALF = 0.5
#: exp of less than this below the maximum is 0
LOW = -1e3
_DEPTH = 24
_SAME = LAYOUT_OPS | frozenset((
    "slice", "narrow", "select", "getitem", "split", "split_with_sizes", "chunk", "unbind",
    "detach", "gather", "index", "index_select", "dropout", "abs", "neg", "sqrt", "lift_fresh",
    "to", "_to_copy", "float", "int", "long", "type_as"))
_STEPS = frozenset(("round", "heaviside", "bernoulli"))


@dataclass(frozen=True)
class Zeros:
    """share: of entries that are not 0; binary: the others are 1."""

    share: float
    binary: bool = False


def nonzero_share(program: Program, node: Any) -> float | None:
    """The expected share of entries that are not 0, None where nothing makes any of them 0."""
    found = _zeros(program, node, _DEPTH)
    return None if found is None else found.share


def _zeros(program: Program, node: Any, depth: int) -> Zeros | None:
    if not isinstance(node, fx.Node) or node.op != "call_function" or depth == 0:
        return _of_input(node)
    name, args = op_name(node), node.args

    def inner(x: Any) -> Zeros | None:
        return _zeros(program, x, depth - 1)

    if name in _SAME or is_cast(node):
        found = inner(args[0])
        return found if found is not None else _of_input(node)
    if name == "one_hot":
        return Zeros(1 / max(_size(node, -1), 1), True)
    if name == "scatter":
        return _scattered(program, node, inner)
    if name == "sum" and is_tensor(args[0]):
        found = inner(args[0])
        dims, _ = reduced_dims(node)
        if found is None or len(dims) != 1:
            return None
        return Zeros(min(1.0, found.share * _size(args[0], next(iter(dims)))), found.binary)
    if name in ("mul", "logical_and", "bitwise_and", "einsum"):
        return _product(program, node, inner)
    if name in ("div", "true_divide"):
        return _weighted(inner(args[0]))
    if name in ("masked_fill", "where"):
        return _chosen(program, node, inner)
    if name in ("sub", "rsub"):
        one, other = args[:2] if name == "sub" else args[1::-1]
        found = inner(other) if _number(program, one) == 1 else None
        return Zeros(1 - found.share, True) if found is not None and found.binary else None
    if name in ("cat", "concat", "stack"):
        return _joined(args[0], inner)
    if name in ("constant_pad_nd", "pad"):
        return _padded(program, node, inner)
    if name in SOFTMAX and "log" not in name:
        return _weighted(_hidden(program, args[0]))
    if name in _STEPS:
        return Zeros(HALF, name == "bernoulli")
    if name == "argmax":
        return Zeros(HALF, True) if _size(args[0], args[1] if len(args) > 1 else -1) == 2 else None
    return _of_input(node)


def _of_input(node: Any) -> Zeros | None:
    """Truth values may be false."""
    truth = is_tensor(node) and node.meta["val"].dtype == torch.bool
    return Zeros(HALF, True) if truth else None


def _weighted(found: Zeros | None) -> Zeros | None:
    return None if found is None else Zeros(found.share)


def _size(node: Any, dim: Any) -> int:
    n = length(node.meta["val"].shape[dim]) if isinstance(dim, int) else 0
    return n if isinstance(n, int) else 0


def _number(program: Program, x: Any) -> Any:
    if isinstance(x, fx.Node):
        return program.constant(x)
    return x if isinstance(x, bool | int | float) else None


def _scattered(program: Program, node: fx.Node, inner: Any) -> Zeros | None:
    """scatter(zeros, dim, index, source)."""
    base, dim, index, source = (*node.args, *node.kwargs.values())[:4]
    if _number(program, base) == 0 and is_tensor(index):
        n = _size(base, dim)
        return Zeros(_size(index, dim) / n, _number(program, source) == 1) if n else None
    return None


def _product(program: Program, node: fx.Node, inner: Any) -> Zeros | None:
    """A product is 0 where a factor is."""
    factors: Any = node.args[:2]
    if op_name(node) == "einsum":
        read = contraction(node)
        if read is None or read.contracted:
            return None
        factors = (read.left, read.right)
    found = [z for z in map(inner, factors) if z is not None]
    if not found:
        return None
    return Zeros(min(z.share for z in found), len(found) == 2 and all(z.binary for z in found))


def _chosen(program: Program, node: fx.Node, inner: Any) -> Zeros | None:
    """where(mask, x, 0) and masked_fill(x, mask, 0)."""
    mask, yes, no = node.args if op_name(node) == "where" else (
        node.args[1], node.args[2], node.args[0])
    numbers = _number(program, yes), _number(program, no)
    condition = inner(mask)
    share = HALF if condition is None else condition.share
    if 0 not in numbers:
        return None
    return Zeros(1 - share if numbers[0] == 0 else share, 1 in numbers)


def _joined(parts: Any, inner: Any) -> Zeros | None:
    found = [(inner(p), p.meta["val"].numel()) for p in parts]
    sizes = [length(n) for _, n in found]
    if all(z is None for z, _ in found):
        return None
    if not all(isinstance(n, int) for n in sizes):
        sizes = [1] * len(found)
    shares = [1.0 if z is None else z.share for z, _ in found]
    return Zeros(sum(s * n for s, n in zip(shares, sizes, strict=True)) / max(sum(sizes), 1))


def _padded(program: Program, node: fx.Node, inner: Any) -> Zeros | None:
    source, _, *rest = node.args
    value = rest[-1] if rest and not isinstance(rest[-1], str) else 0
    found, sizes = inner(source), [length(x.meta["val"].numel()) for x in (source, node)]
    if value is None or found is None and value != 0:
        return None
    part = sizes[0] / sizes[1] if all(isinstance(n, int) and n for n in sizes) else 1.0
    share = (1.0 if found is None else found.share) * part + (1 - part if value else 0.0)
    return Zeros(share, found is not None and found.binary and value in (0, 1))


def _hidden(program: Program, node: Any) -> Zeros | None:
    """The share of logits that are not filled with a number so low that their weight is 0."""
    name = op_name(node) if isinstance(node, fx.Node) and node.op == "call_function" else ""

    def low(x: Any) -> bool:
        number = _number(program, x)
        return number is not None and number <= LOW

    if name == "masked_fill" and low(node.args[2]) or name == "where" and any(
            map(low, node.args[1:])):
        return Zeros(HALF)
    if name == "scatter" and low(node.args[0]):
        n = _size(node, node.args[1])
        return Zeros(_size(node.args[2], node.args[1]) / n) if n else None
    return None
