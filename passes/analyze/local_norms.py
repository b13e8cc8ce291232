"""Key norms in the scores of a local attention: 2 q.k - |k|^2 is |q|^2 - |q - k|^2.

A model that compares by squared distances writes c * (2 q.k - |k|^2), with |k|^2 summed over the
copied keys (XRAVOS, non-local means). As |q|^2 is the same for all keys of a row, the softmax is
that of -c * |q - k|^2: a score of its own kind, without a term per key and without the digits that
the difference of the two loses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import fx

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.passes.analyze.movement import Index, Mover, Piece
from attnopt.passes.normalize import is_tensor, op_name
from attnopt.passes.recognize.contraction import reduced_dims
from attnopt.rules import Decline

#: |k|^2, in expressions on the way
NORM = E.load("__key_norm")
_ZERO = E.const(0.0)


def is_key_norm(mover: Mover, node: fx.Node, index: Index, inner: torch.Tensor,
                key: Sequence[Piece]) -> bool:
    """Is `node` at `index` the sum of squares over the features of the keys?

    inner: the index along the features; key: the pieces that the keys are made of
    """
    if node.op != "call_function" or op_name(node) != "sum" or not is_tensor(node.args[0]) \
            or node.kwargs.get("dtype") is not None or node.meta.get("attnopt_opaque"):
        return False
    square = node.args[0]
    assert isinstance(square, fx.Node)
    name = op_name(square) if square.op == "call_function" else ""
    if not (name == "square" or (name == "pow" and square.args[1] == 2)
            or (name == "mul" and square.args[0] is square.args[1])):
        return False
    dims, keep = reduced_dims(node)
    source = square.args[0]
    if len(dims) != 1 or not isinstance(source, fx.Node):
        return False
    (dim,) = dims
    whole = (*index[:dim], inner, *index[dim + 1 if keep else dim:])
    found = mover.pull(source, whole)
    mover.passed |= {node, square}
    return len(found) == len(key) and all(map(_same, found, key))


def _same(a: Piece, b: Piece) -> bool:
    if a.node is not b.node or a.value != b.value:
        return False
    pairs = [(a.where, b.where), *zip(a.index, b.index, strict=True)]
    return all(torch.equal(*torch.broadcast_tensors(x, y)) for x, y in pairs)


def as_distance(e: Expr, constant: Callable[[Expr], bool]) -> Expr:
    """`e`, logits over a dot product and `NORM`, over the squared distance, up to what is the same
    for all keys of a row, as `constant` tells.
    """
    dot, norm, rest = _affine(e, constant)
    if norm == 0 or not math.isclose(dot, -2 * norm, rel_tol=1e-6):
        raise Decline("key norms in the scores that make no squared distance")
    scaled = E.call("mul", E.score, norm)
    return scaled if rest is _ZERO else E.call("add", scaled, rest)


def _affine(e: Expr, constant: Callable[[Expr], bool]) -> tuple[float, float, Expr]:
    """(a, b, rest) with e = a * score + b * NORM + rest, up to a constant of the row."""
    def part(x: Expr) -> tuple[float, float, Expr]:
        return _affine(x, constant)

    if e is E.score:
        return 1.0, 0.0, _ZERO
    if e is NORM:
        return 0.0, 1.0, _ZERO
    if not e.has("score") and NORM not in e.leaves:
        return 0.0, 0.0, _ZERO if constant(e) else e
    if e.op in ("add", "sub"):
        (a, b, r), (c, d, s) = map(part, e.args)
        sign = 1 if e.op == "add" else -1
        rest = r if s is _ZERO else E.call(e.op, r, s)
        return a + sign * c, b + sign * d, rest
    if e.op == "neg":
        a, b, r = part(e.args[0])
        return -a, -b, r if r is _ZERO else -r
    if e.op in ("mul", "div") and e.args[1].op == "const":
        a, b, r = part(e.args[0])
        c = float(e.args[1].value) if e.op == "mul" else 1 / float(e.args[1].value)
        return a * c, b * c, r if r is _ZERO else E.call(e.op, r, e.args[1])
    raise Decline("key norms in the scores that make no squared distance")
