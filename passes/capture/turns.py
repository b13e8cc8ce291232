"""Shapes that are changed in place: x.unsqueeze_(2) as x = x.unsqueeze(2).

Such an operation writes nothing into memory, but it counts as a write: what autograd saved of the
tensor is out of date after it. Where the tensor is one of its own (no argument, no view of another,
no views of it before) and nothing is written into its memory later, nobody can tell the two forms
apart (BigBird's first and last blocks, arXiv 2007.14062).
"""

from __future__ import annotations

import torch
from torch import fx

from attnopt.passes.normalize import _aliased, hidden_sources, writes

aten = torch.ops.aten
#: operations that change the shape of a tensor in place, and what they are without
_TURNS = {
    aten.unsqueeze_.default: aten.unsqueeze.default,
    aten.squeeze_.default: aten.squeeze.default,
    aten.squeeze_.dim: aten.squeeze.dim,
    aten.squeeze_.dims: aten.squeeze.dims,
    aten.transpose_.default: aten.transpose.int,
    aten.t_.default: aten.t.default,
    aten.swapaxes_.default: aten.swapaxes.default,
    aten.swapdims_.default: aten.swapdims.default,
}


def settle_turns(graph: fx.Graph) -> None:
    """Write `graph` without the changes of shape in place that need not be."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in [n for n in graph.nodes if n.op == "call_function" and n.target in _TURNS]:
        target = node.args[0]
        if not isinstance(target, fx.Node) or not _own(target, node, order):
            continue
        node.target = _TURNS[node.target]
        for user in [u for u in target.users if order[u] > order[node]]:
            user.replace_input_with(target, node)


def _own(target: fx.Node, turn: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Is it a tensor of its own, of which there are no views before `turn` and no writes after?"""
    if target.op != "call_function" or hidden_sources(target) or writes(target) \
            or _aliased(target) is not None:
        return False
    shared, stack = {target}, [target]
    while stack:
        node = stack.pop()
        for user in node.users:
            if user in shared or user is turn or order[user] < order[turn] and not _shares(user):
                continue
            if user.op == "call_function" and writes(user) or hidden_sources(user):
                return False
            if _shares(user):
                if node is target and order[user] < order[turn]:
                    return False
                shared.add(user)
                stack.append(user)
        if node is target and turn not in shared:
            shared.add(turn)
            stack.append(turn)
    return True


def _shares(node: fx.Node) -> bool:
    return node.op == "call_function" and _aliased(node) is not None
