"""Lift a bias that is a product over a small axis: an outer product, a distance, a low-rank form.

    bias[q, k] = sum over r of f[q, r] * g[k, r]        matmul, bmm, mm, einsum over one index
    bias[q, k] = sum over c of e(x[q, c], y[k, c])      sum over a last axis, cdist

Few terms are written out: a kernel computes them in float32, difference by difference, so that no
digits are lost where coordinates are far from the origin ((q - k)^2 as q^2 - 2qk + k^2 would lose
them, and 16 bits hold no position). More terms are a second dot product, `inner(f, g)`, in which
the factors enter as they are, of rank r (arXiv 2505.12044), and so do factors that are learned:
their gradients come with those of query and key then. Nothing of queries x keys is made.

A product with a one-hot tensor looks its other factor up (T5X's relative embeddings):

    bias[h, q, k] = sum over r of (bucket(q, k) == r) * table[r, h] = table[bucket(q, k), h]
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.passes.analyze.lift import Bound, Index, Unliftable
from attnopt.passes.analyze.lift_types import dtype_of
from attnopt.passes.normalize import is_tensor, op_name

if TYPE_CHECKING:
    from attnopt.passes.analyze.lift_floats import FloatLifter

#: terms that are written out at most
WRITTEN = 4
#: conversions through which a one-hot tensor stays one
_CASTS = ("to", "_to_copy", "type_as", "float", "half", "bfloat16")
_Q, _K = E.index("q"), E.index("k")
#: stands for the index that is summed over
_R = E.index("d")


def _product(lift: FloatLifter, node: fx.Node, left: tuple[Any, Index], right: tuple[Any, Index]
             ) -> Expr:
    """sum over r of left * right, with `_R` among the indices of both."""
    sides = left, right
    for one, table in (sides, sides[::-1]):
        if (found := _looked_up(lift, node, one, table)) is not None:
            return found
    for x, idx in sides:
        if not is_tensor(x) or dtype_of(x) != dtype_of(node) or not dtype_of(x).is_floating_point:
            raise Unliftable("factors of other types")
        if dtype_of(x) == torch.float64:
            raise Unliftable("float64")
        along = frozenset().union(*(i.indices for i in idx)) & {"q", "k"}
        if len(along) > 1:
            raise Unliftable("a factor along both queries and keys")
    rank = _length(*left)
    if rank != _length(*right):
        raise Unliftable("a broadcast contraction")
    if rank <= WRITTEN and dtype_of(node) == torch.float32 and not any(
            _learned(lift, x) for x, _ in sides):
        return _written(lift, rank, lambda at: E.call("mul", *(
            lift.float32(lift.element(x, _put(idx, at)), x) for x, idx in sides)))
    if _has(right[1], _Q):
        left, right = right, left
    names = [_factor(lift, x, idx, own) for (x, idx), own in zip((left, right), (_Q, _K),
                                                                 strict=True)]
    return E.inner(*names)


def _looked_up(lift: FloatLifter, node: fx.Node, one: tuple[Any, Index],
               table: tuple[Any, Index]) -> Expr | None:
    """The entry that a one-hot factor picks: one_hot has checked that there is one."""
    source = one[0]
    while isinstance(source, fx.Node) and op_name(source) in _CASTS and is_tensor(source.args[0]):
        source = source.args[0]
    if not isinstance(source, fx.Node) or op_name(source) != "one_hot" or one[1][-1] is not _R \
            or not is_tensor(table[0]) or dtype_of(table[0]) != dtype_of(node) \
            or _R in one[1][:-1] or _length(*one) != _length(*table):
        return None
    place = lift.element(source.args[0], one[1][:-1])  # type: ignore[arg-type]
    return lift.looked_up(table[0], _put(table[1], place))


def _factor(lift: FloatLifter, node: fx.Node, idx: Index, own: Expr) -> str:
    """The name of a factor whose tokens are those of the scores, all of them in order."""
    if own not in idx:
        raise Unliftable("a factor along other tokens")
    name = f"{node.name}_{'rows' if own is _Q else 'columns'}"
    known = lift.factors.setdefault(name, (node, idx))
    if known != (node, idx):
        raise Unliftable("one factor in two ways")
    lift.nodes[name] = node
    return name


def _length(node: fx.Node, idx: Index) -> int:
    """That of the dimension that is summed over."""
    size = node.meta["val"].shape[idx.index(_R)]
    if not isinstance(size, int):
        raise Unliftable("a contraction of unknown length")
    return size


def _written(lift: FloatLifter, count: int, term: Callable[[Expr], Expr]) -> Expr:
    terms = [term(E.const(c)) for c in range(count)]
    if not terms:
        return E.const(0.0)
    return functools.reduce(lambda a, b: E.call("add", a, b), terms)


def _put(idx: Index, at: Expr) -> Index:
    return tuple(at if i is _R else i for i in idx)


def _has(idx: Index, axis: Expr) -> bool:
    return any(axis in i.leaves for i in idx)


def _learned(lift: FloatLifter, node: fx.Node) -> bool:
    """Is the tensor made of a parameter?"""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        n = stack.pop()
        if n not in seen:
            seen.add(n)
            if n.op == "placeholder" and lift.kind_of.get(n.name) == "parameter":
                return True
            stack.extend(n.all_input_nodes)
    return False


# -- rules ----------------------------------------------------------------------------------------
def matmul(lift: FloatLifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    """(…, i, r) @ (…, r, j)"""
    left, right = node.args[:2]
    if not all(is_tensor(x) and x.meta["val"].dim() >= 2 for x in (left, right)):
        raise Unliftable("a product of vectors")
    leads = [idx[len(idx) - x.meta["val"].dim() : -2] for x in (left, right)]  # type: ignore
    return _product(lift, node, (left, (*leads[0], idx[-2], _R)), (right, (*leads[1], _R, idx[-1])))


def einsum(lift: FloatLifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    """A product of two over one index, as in "bhqr,bhkr->bhqk"."""
    inputs, arrow, output = a.equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    letters = set("".join(terms))
    summed = letters - set(output)
    plain = arrow and "." not in a.equation and len(terms) == len(a.tensors) == 2 and all(
        len(set(t)) == len(t) for t in (*terms, output)) and set(output) <= letters
    if not plain or len(summed) != 1 or not all(summed <= set(t) for t in terms):
        raise Unliftable("another contraction")
    place = dict(zip(output, idx, strict=True)) | {next(iter(summed)): _R}
    left, right = ((x, tuple(place[c] for c in t)) for x, t in zip(a.tensors, terms, strict=True))
    return _product(lift, node, left, right)


def total(lift: FloatLifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    """sum over one short axis."""
    source = a.values.get("self")
    dims = a.get("dim")
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    if source is None or not is_tensor(source) or len(dims) != 1 \
            or {dtype_of(source), dtype_of(node)} != {torch.float32}:
        raise Unliftable("another sum")
    shape = source.meta["val"].shape
    at = dims[0] % len(shape)
    rest = idx if not a.get("keepdim", False) else (*idx[:at], *idx[at + 1 :])
    if not isinstance(shape[at], int) or shape[at] > WRITTEN:
        raise Unliftable(f"a sum of more than {WRITTEN}")

    def term(c: Expr) -> Expr:
        return lift.float32(lift.element(source, (*rest[:at], c, *rest[at:])), source)
    return _written(lift, shape[at], term)


def distance(lift: FloatLifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    """cdist: the root of the sum of squared differences."""
    left, right = a.values["x1"], a.values["x2"]
    shape = left.meta["val"].shape
    if a.get("p", 2.0) != 2 or dtype_of(node) != torch.float32 or any(
            dtype_of(x) != torch.float32 for x in (left, right)):
        raise Unliftable("another distance")
    if not isinstance(shape[-1], int) or shape[-1] > WRITTEN:
        raise Unliftable(f"coordinates of more than {WRITTEN} axes")
    leads = [idx[len(idx) - x.meta["val"].dim() : -2] for x in (left, right)]

    def term(c: Expr) -> Expr:
        x, y = (lift.float32(lift.element(n, (*lead, i, c)), n) for n, lead, i in zip(
            (left, right), leads, idx[-2:], strict=True))
        return (x - y) * (x - y)
    return E.call("sqrt", _written(lift, shape[-1], term))


def linear(lift: FloatLifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    """(…, r) @ (o, r)^T of a one-hot tensor; others are tensors of their own."""
    found = None
    if a.get("bias") is None and a.weight.meta["val"].dim() == 2:
        found = _looked_up(lift, node, (a.input, (*idx[:-1], _R)), (a.weight, (idx[-1], _R)))
    if found is None:
        raise Unliftable("a linear layer")
    return found


CONTRACTIONS = {**dict.fromkeys(("matmul", "__matmul__", "bmm", "mm"), matmul), "einsum": einsum,
                "linear": linear, "sum": total,
                **dict.fromkeys(("cdist", "_cdist_forward"), distance)}


def contract(lift: FloatLifter, node: fx.Node, a: Bound, idx: Index) -> Expr:
    """The element of a contraction of any type."""
    return CONTRACTIONS[op_name(node)](lift, node, a, idx)
