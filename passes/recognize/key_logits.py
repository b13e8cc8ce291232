"""Logits per key: where they come from, for attention whose scores no query enters.

One layer gives each token its logit, alone or as some of its features (`split`, a slice): a linear
layer, a convolution, or a contraction. The softmax runs over tokens; one that runs over features of
such a layer is a router, a gate or a classifier.
"""

from __future__ import annotations

import operator

from torch import fx

from attnopt.passes.normalize import is_tensor, op_name
from attnopt.passes.recognize.axes import Axis, Layout, axes_of, resolve, settle, shape_of
from attnopt.passes.recognize.heads import head_mix
from attnopt.passes.recognize.layout import back
from attnopt.passes.recognize.pointwise import is_cast
from attnopt.passes.recognize.program import SOFTMAX, Program, carries
from attnopt.passes.recognize.scores import raw_score
from attnopt.rules import Decline

_PARTS = frozenset(("split", "split_with_sizes", "chunk", "tensor_split", "unbind"))
_MOST_NODES = 256


def key_logits(program: Program, node: fx.Node) -> list[tuple[fx.Node, frozenset[fx.Node]]]:
    """Tensors that may hold the logits of `node`, each with the nodes from it to `node`."""
    seen: set[fx.Node] = set()
    sources: list[fx.Node] = []
    stack = [node]
    while stack and len(seen) < _MOST_NODES:
        at = stack.pop()
        if at in seen or at.op != "call_function" or at.meta.get("attnopt_opaque"):
            continue
        seen.add(at)
        if _is_layer(at) or _is_part(at):
            sources.append(at)
        mix = head_mix(at)
        if mix is not None:
            stack.append(mix.source)
        elif carries(at) and not (_is_layer(at) or _is_part(at)):
            stack += at.all_input_nodes
    return [(s, _between(s, node, seen)) for s in sorted(sources, key=program.order.__getitem__)]


def _between(start: fx.Node, end: fx.Node, among: set[fx.Node]) -> frozenset[fx.Node]:
    found, stack = set[fx.Node](), [start]
    while stack:
        at = stack.pop()
        if at in among and at not in found:
            found.add(at)
            if at is not end:
                stack += at.users
    return frozenset(found)


def _is_layer(node: fx.Node) -> bool:
    name = op_name(node)
    return name == "linear" or name.startswith("conv") or name in SOFTMAX \
        or raw_score(node) is not None


def _is_part(node: fx.Node) -> bool:
    """Some indices of a dimension: a slice, or one of the results of a split."""
    if node.target is operator.getitem:
        return op_name(node.args[0]) in _PARTS  # type: ignore[arg-type]
    return op_name(node) in ("slice", "narrow", "select")


def varies_with_feature(node: fx.Node, layout: Layout, keys: frozenset[Axis]) -> bool:
    """Do `keys` run over the features of the layer that made `node`, or can that not be told?"""
    while True:
        name = op_name(node) if node.op == "call_function" else ""
        if name == "linear":
            return bool(keys & frozenset(resolve(layout[-1])))
        if name.startswith("conv"):
            weight = node.args[1]
            rank = len(shape_of(weight.meta["val"]))  # type: ignore[union-attr]
            return bool(keys & frozenset(resolve(layout[len(layout) - rank + 1])))
        if not name or node.meta.get("attnopt_opaque"):
            return True
        if raw_score(node) is not None:
            return False
        try:
            step = (node.args[0], layout) if is_cast(node) else back(node, layout)
            if step is None and _is_part(node):
                step = _whole(node, layout, keys)
        except Decline:
            return True
        if step is None or not is_tensor(step[0]):
            return True
        node, layout = step[0], settle(step[1])  # type: ignore[assignment]


def _whole(node: fx.Node, layout: Layout, keys: frozenset[Axis]) -> tuple[fx.Node, Layout] | None:
    """What `node` is a part of; its indices along the dimension that is cut are a new axis."""
    parts = node.args[0] if node.target is operator.getitem else node
    assert isinstance(parts, fx.Node)
    source = parts.args[0]
    at = {"split": 2, "split_with_sizes": 2, "chunk": 2, "tensor_split": 2}.get(op_name(parts), 1)
    dim = parts.args[at] if len(parts.args) > at else parts.kwargs.get("dim", 0)
    if not is_tensor(source) or not isinstance(dim, int):
        return None
    shape = shape_of(source.meta["val"])  # type: ignore[union-attr]
    dim %= len(shape)
    removed = op_name(parts) in ("select", "unbind")
    before, after = layout[:dim], layout[dim if removed else dim + 1:]
    if not removed and keys & axes_of(layout[dim:dim + 1]):
        return None
    return source, (*before, (Axis(shape[dim]),), *after)  # type: ignore[return-value]
