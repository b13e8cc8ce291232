"""The locations of a sampling in one pass: base + offset / size over axes that run together.

    reference[:, :, None, :, None, :] + offsets / sizes[None, None, None, :, None, :]

is (B, Q, heads, levels, points, axes) with operands that repeat along points, and heads or rows.
ATen's loop on a CPU runs over the last axes that all operands have in full, here the two or three
numbers of a place. The operands that repeat are written out along levels, points and axes, which
is little as they have no heads or no rows, and a sum with a quotient or a product is one
`addcdiv` or `addcmul`. The same numbers are computed (of a product, unrounded before the sum).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from attnopt.passes.normalize import writes

aten = torch.ops.aten
_POINTWISE = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
_VIEWS = (aten.reshape.default, aten.view.default, aten.flatten.using_ints,
          aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims)
_FUSED = {aten.div.Tensor: aten.addcdiv.default, aten.mul.Tensor: aten.addcmul.default}
#: elements that a loop over the last axes should have
_RUN = 16
#: how often what an operand written out holds should be used
_SHARE = 4


def run_together(graph: fx.Graph) -> int:
    """Rewrite the arithmetic in front of each sampling on a CPU; how many nodes were rewritten."""
    changed = 0
    for node in list(graph.nodes):
        if node.target is torch.ops.attnopt.deformable_attention.default:
            changed += _walk(graph, node.args[1])
    return changed


def _walk(graph: fx.Graph, node: fx.Node) -> int:
    """Up from locations through what computes them alone."""
    changed = 0
    while len(node.users) == 1 and node.op == "call_function":
        if node.target in _VIEWS:
            node = node.args[0]  # type: ignore[assignment]
            continue
        if node.target not in _POINTWISE or node.kwargs or not _plain(node):
            break
        shape = node.meta["val"].shape
        changed += _spread_operands(graph, node) + _fuse(graph, node)
        full = next((a for a in node.args if _plain(a) and _same(a.meta["val"].shape, shape)), None)
        if full is None:
            break
        node = full  # type: ignore[assignment]
    return changed


def _plain(node: Any) -> bool:
    """A floating tensor on a CPU."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.is_floating_point() \
        and value.device.type == "cpu"


def _spread_operands(graph: fx.Graph, node: fx.Node) -> int:
    """Write out the operands that repeat along the last axes of the result."""
    shape = list(node.meta["val"].shape)
    changed = 0
    for place, operand in enumerate(node.args):
        if not _plain(operand):
            continue
        assert isinstance(operand, fx.Node)
        given = operand.meta["val"]
        if given.dim() != len(shape) or given.numel() <= 1:
            continue
        first, run = len(shape), 1
        while first > 0 and run < _RUN and isinstance(shape[first - 1], int):
            first -= 1
            run *= shape[first]
        if run < _RUN or _same(given.shape[first:], shape[first:]) \
                or _repeats(given.shape[:first], shape[:first]) < _SHARE:
            continue
        sizes = [-1] * first + shape[first:]
        with graph.inserting_before(node):
            whole = graph.call_function(aten.expand.default, (operand, sizes))
            made = graph.call_function(aten.clone.default, (whole,),
                                       {"memory_format": torch.contiguous_format})
        whole.meta = {**node.meta, "val": given.expand(sizes)}
        made.meta = {**node.meta, "val": whole.meta["val"].contiguous()}
        node.update_arg(place, made)
        changed += 1
    return changed


def _repeats(given: Sequence[Any], shape: Sequence[Any]) -> float:
    """How often an operand is used along these axes; a symbolic size counts as many."""
    return math.prod(n if isinstance(n, int) else math.inf
                     for own, n in zip(given, shape, strict=True)
                     if isinstance(own, int) and own == 1)


def _same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Equal sizes, without a question to a symbolic one."""
    return [str(n) for n in one] == [str(n) for n in other]


def _fuse(graph: fx.Graph, node: fx.Node) -> int:
    """base + x / y as one node, in place of two."""
    if node.target is not aten.add.Tensor:
        return 0
    value = node.meta["val"]
    for base, inner in (node.args, node.args[::-1]):
        if not (_plain(base) and _plain(inner)) or inner.target not in _FUSED \
                or len(inner.users) != 1 or inner.kwargs \
                or not _same(inner.meta["val"].shape, value.shape) \
                or not all(_plain(a) for a in inner.args) \
                or len({a.meta["val"].dtype for a in (base, node, *inner.args)}) > 1 \
                or not _movable(inner, node):
            continue
        _spread_operands(graph, inner)
        node.target, node.args = _FUSED[inner.target], (base, *inner.args)
        graph.erase_node(inner)
        return 1
    return 0


def _movable(inner: fx.Node, node: fx.Node) -> bool:
    """Does `inner` give the same at the place of `node`, which is the later one? Nothing is
    written in between, and both record gradients or neither does."""
    if inner.meta.get("attnopt_region") != node.meta.get("attnopt_region"):
        return False
    at = node.prev
    while at is not inner:
        if at.op == "call_function" and writes(at):
            return False
        at = at.prev
    return True
