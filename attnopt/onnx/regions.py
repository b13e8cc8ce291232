"""Where attention is in an ONNX graph: the nodes around each Softmax or Attention.

A region ends in the product with the values (or is an Attention). Backwards it holds what moves the
queries, keys and values, and all that scores, masks and biases are made of, up to what is no part
of an attention: a product with a matrix of weights, a node without a counterpart in torch, another
region. What lies there is the region's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from attnopt.onnx.read import constant, known

#: operators between the weights and their product with the values
_BETWEEN = {"Cast", "Identity", "Dropout", "Where", "IsNaN", "Mul", "Div", "Transpose", "Reshape",
            "Squeeze", "Unsqueeze"}
#: what moves data or scales it
_MOVES = {"Cast", "Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Expand", "Slice",
          "Concat", "Split", "Gather", "Pad"}
_SCALES = {"Mul", "Div"}
_PRODUCTS = {"MatMul", "Gemm", "Einsum"}


@dataclass(frozen=True, eq=False)
class Region:
    """Nodes in the order of the graph, their inputs, and the one value that they give.

    anchor: the node that it was found by, for reports
    """

    nodes: tuple[ir.Node, ...]
    inputs: tuple[ir.Value, ...]
    output: ir.Value
    anchor: str


def regions(graph: ir.Graph) -> tuple[list[Region], list[str]]:
    """The regions of a graph, and why others are none."""
    places = {node: i for i, node in enumerate(graph)}
    fixed = _fixed(graph)
    found: list[Region] = []
    kept: list[str] = []
    ends: set[ir.Value] = set()
    for node in graph:
        if node.domain or node.op_type not in ("Softmax", "Attention"):
            continue
        name = node.name or node.outputs[0].name or node.op_type
        last, reason = (node, "") if node.op_type == "Attention" else _product(node)
        if last is None:
            kept.append(f"{name}: {reason}")
            continue
        inside = _inside(node, last, fixed, ends)
        ordered = tuple(sorted(inside, key=lambda n: places.get(n, -1)))
        outputs = {o for n in ordered for o in n.outputs}
        inputs = dict.fromkeys(
            v for n in ordered for v in n.inputs
            if v is not None and v not in outputs and constant(v) is None)
        found.append(Region(ordered, tuple(inputs), last.outputs[0], name))
        ends.add(last.outputs[0])
    return found, kept


def _product(softmax: ir.Node) -> tuple[ir.Node | None, str]:
    """The product of the weights of a Softmax with the values."""
    value = softmax.outputs[0]
    for _ in range(12):
        users = list(dict.fromkeys(use.node for use in value.uses()))
        if value.is_graph_output() or not users:
            return None, "the weights are an output of their own"
        nans = [u for u in users if u.op_type == "IsNaN"]
        users = [u for u in users if u not in nans]
        if len(users) != 1 or not known(users[0]):
            return None, "the weights are used elsewhere too"
        user = users[0]
        if user.op_type in ("MatMul", "Einsum"):
            return user, ""
        if user.op_type not in _BETWEEN:
            return None, f"the weights go to {user.op_type}, not to a product with values"
        value = user.outputs[0]
    return None, "no product with values follows"


def _fixed(graph: ir.Graph) -> set[ir.Value]:
    """Values that are computed from constants and sizes alone."""
    found: set[ir.Value] = set()
    for node in graph:
        sizes = node.op_type in ("Shape", "Constant")
        if not node.domain and (sizes or known(node)) and (sizes or all(
                v is None or v in found or constant(v) is not None for v in node.inputs)):
            found.update(node.outputs)
    return found


def _inside(anchor: ir.Node, last: ir.Node, fixed: set[ir.Value], ends: set[ir.Value]
            ) -> set[ir.Node]:
    """The nodes of a region, from its last one back."""
    inside: set[ir.Node] = set()
    behind = _behind(anchor, last)
    # Whether a node is one of the scores: all of it belongs; otherwise only what moves data does.
    work: list[tuple[ir.Node, bool]] = [(last, anchor is not last)]
    seen: set[tuple[ir.Node, bool]] = set()
    while work:
        node, scores = work.pop()
        if (node, scores) in seen:
            continue
        seen.add((node, scores))
        inside.add(node)
        if node.op_type == "Shape":
            continue
        for place, value in enumerate(node.inputs):
            producer = None if value is None else value.producer()
            if value is None or producer is None or value in ends or constant(value) is not None:
                continue
            of_scores = scores
            if node is last and node is not anchor:
                of_scores = producer in behind
            elif node is anchor and node.op_type == "Attention":
                of_scores = place == 3
            elif node.op_type in _PRODUCTS and node not in behind:
                of_scores = False
            if producer in behind or value in fixed or _belongs(producer, of_scores):
                work.append((producer, of_scores or value in fixed))
    return inside


def _behind(anchor: ir.Node, last: ir.Node) -> set[ir.Node]:
    """The nodes from the softmax to the last."""
    found, work = {anchor}, [anchor]
    while work:
        node = work.pop()
        if node is last:
            continue
        for output in node.outputs:
            for use in output.uses():
                if use.node not in found and (use.node is last or use.node.op_type in _BETWEEN):
                    found.add(use.node)
                    work.append(use.node)
    return found


def _belongs(node: ir.Node, scores: bool) -> bool:
    if not known(node):
        return False
    if node.op_type in _PRODUCTS:
        return scores and not _projects(node)
    if node.op_type in _MOVES:
        return True
    if node.op_type in _SCALES and any(_is_number(v) for v in node.inputs):
        return True
    return scores and node.op_type not in ("Softmax", "Attention")


def _projects(node: ir.Node) -> bool:
    """Whether a product is one with a matrix of weights."""
    def matrix(value: ir.Value | None) -> bool:
        held = constant(value)
        return held is not None and len(held.shape) == 2

    return any(matrix(v) for v in node.inputs)


def _is_number(value: ir.Value | None) -> bool:
    held = constant(value)
    return held is not None and held.size == 1


def shared(found: Sequence[Region]) -> set[ir.Value]:
    """The values that several regions need: run once for all of them."""
    return {v for region in found for v in region.inputs}
