"""Contractions: matmul, bmm, baddbmm, addmm, mv, einsum and multiply-then-sum as one form.

Each dimension of both operands and of the result is given an `Axis`; a contraction is then known
by which axes are in which layout, whatever the operation was called and however its operands were
permuted. Broadcast dimensions hold no axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnopt.passes.normalize import is_tensor, op_name
from attnopt.passes.recognize.axes import (
    Axis,
    Layout,
    axes_of,
    broadcast,
    fresh,
    length,
    settle,
)

aten = torch.ops.aten


@dataclass
class Contraction:
    """out[out_layout] = alpha * sum over contracted of left * right (+ beta * addend)."""

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_layout: Layout
    right_layout: Layout
    out_layout: Layout
    alpha: float = 1.0
    addend: fx.Node | None = None
    beta: float = 1.0
    #: nodes that belong to it besides `node` (the multiplication of multiply-then-sum)
    inner: tuple[fx.Node, ...] = ()

    @property
    def contracted(self) -> frozenset[Axis]:
        both = axes_of(self.left_layout) & axes_of(self.right_layout)
        return both - axes_of(self.out_layout)

    def sides(self) -> tuple[tuple[fx.Node, Layout], tuple[fx.Node, Layout]]:
        return (self.left, settle(self.left_layout)), (self.right, settle(self.right_layout))


def contraction(node: fx.Node) -> Contraction | None:
    """Read `node` as a contraction of two tensors, or None."""
    if node.op != "call_function" or not is_tensor(node):
        return None
    reader = _READERS.get(op_name(node))
    return reader(node) if reader is not None else None


def _shape(node: fx.Node) -> Sequence[Any]:
    return node.meta["val"].shape


def _matmul(node: fx.Node) -> Contraction | None:
    left, right = node.args[:2]
    if not (is_tensor(left) and is_tensor(right)):
        return None
    return _product(node, left, right)  # type: ignore[arg-type]


def _product(node: fx.Node, left: fx.Node, right: fx.Node, **more: Any) -> Contraction:
    """matmul's rules: vectors, matrices, and broadcast batch dimensions."""
    ls, rs = _shape(left), _shape(right)
    inner = Axis(ls[-1])
    row = () if len(ls) == 1 else ((Axis(ls[-2]),),)
    column = () if len(rs) == 1 else ((Axis(rs[-1]),),)
    batch = fresh(_shape(node)[: len(_shape(node)) - len(row) - len(column)])
    left_batch, right_batch = ls[: max(len(ls) - 2, 0)], rs[: max(len(rs) - 2, 0)]
    right_core = ((inner,), *column)
    return Contraction(
        node, left, right,
        (*broadcast(batch, left_batch), *row, (inner,)),
        (*broadcast(batch, right_batch), *right_core),
        (*batch, *row, *column), **more)


def _with_addend(node: fx.Node) -> Contraction | None:
    addend, left, right = node.args[:3]
    if not (is_tensor(left) and is_tensor(right)):
        return None
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    if not isinstance(alpha, (int, float)) or not isinstance(beta, (int, float)):
        return None
    return _product(node, left, right, alpha=alpha, beta=beta,  # type: ignore[arg-type]
                    addend=addend if beta != 0 else None)


def _einsum(node: fx.Node) -> Contraction | None:
    equation, operands = node.args[:2]
    if not isinstance(equation, str) or len(operands) != 2:  # type: ignore[arg-type]
        return None
    if not all(map(is_tensor, operands)):  # type: ignore[arg-type]
        return None
    left, right = operands  # type: ignore[misc]
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    ranks = [len(_shape(left)), len(_shape(right))]
    dots = max(r - len(t.replace("...", "")) for r, t in zip(ranks, terms, strict=True))
    if dots > 9:
        return None
    terms = [_spell(t, r) for t, r in zip(terms, ranks, strict=True)]
    if not arrow:
        once = sorted(c for c in set("".join(terms)) if "".join(terms).count(c) == 1
                      and c.isalpha())
        output = "..." + "".join(once)
    output = _spell(output, len(_shape(node))) if "..." in output else output
    if any(len(set(t)) != len(t) for t in (*terms, output)):
        return None  # a diagonal
    sizes: dict[str, Any] = {}
    for term, operand in zip(terms, (left, right), strict=True):
        for letter, size in zip(term, _shape(operand), strict=True):
            if length(sizes.get(letter, 1)) == 1:
                sizes[letter] = size
    if any(c not in output and sum(c in t for t in terms) == 1 for c in sizes
           if length(sizes[c]) != 1):
        return None  # summed in one operand alone
    axes = {c: Axis(s) for c, s in sizes.items()}

    def layout(term: str, shape: Sequence[Any]) -> Layout:
        return tuple((axes[c],) if length(s) == length(sizes[c]) else ()
                     for c, s in zip(term, shape, strict=True))

    return Contraction(node, left, right, layout(terms[0], _shape(left)),
                       layout(terms[1], _shape(right)), layout(output, _shape(node)))


def _spell(term: str, rank: int) -> str:
    """Give the dimensions of an ellipsis letters of their own, aligned on the right."""
    missing = rank - len(term.replace("...", ""))
    return term.replace("...", "987654321"[9 - missing:] if missing else "")


def sum_of_product(node: fx.Node) -> Contraction | None:
    source = node.args[0]
    if not is_tensor(source) or op_name(source) != "mul":  # type: ignore[arg-type]
        return None
    if node.kwargs.get("dtype") is not None:
        return None
    left, right = source.args[:2]  # type: ignore[union-attr]
    if not (is_tensor(left) and is_tensor(right)) or left is right:
        return None
    shape = _shape(source)  # type: ignore[arg-type]
    dims, keep = reduced_dims(node)
    if not dims:
        return None
    full = tuple((Axis(s),) for s in shape)
    result = tuple(a if i not in dims else () for i, a in enumerate(full)
                   if keep or i not in dims)
    sides = broadcast(full, _shape(left)), broadcast(full, _shape(right))
    if any(i < len(shape) - len(side) or not side[len(side) - len(shape) + i]
           for side in sides for i in dims if length(shape[i]) != 1):
        return None  # summed in one operand alone
    return Contraction(node, left, right, *sides, result, inner=(source,))  # type: ignore


def reduced_dims(node: fx.Node) -> tuple[frozenset[int], bool]:
    """Dimensions that a reduction (sum, amax, logsumexp …) removes, and whether it keeps them."""
    rank = len(_shape(node.args[0]))  # type: ignore[arg-type]
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    if dims is None or dims == []:
        dims = list(range(rank))
    dims = [dims] if isinstance(dims, int) else dims
    return frozenset(d % rank for d in dims), bool(keep)  # type: ignore[union-attr]


_READERS = {
    "matmul": _matmul, "bmm": _matmul, "mm": _matmul, "mv": _matmul, "baddbmm": _with_addend,
    "addmm": _with_addend, "einsum": _einsum, "sum": sum_of_product,
}
