"""Factors of constant biases as numbers, in graphs that are written to files.

`attnopt::factor` makes both factors of a bias anew at each call, because the tensor that holds the
bias may change between calls, and inverts a matrix of pivots for that, for which ONNX has no
operator. Nothing can change the constants of a program that is written without attnopt, so there
each factor is computed once: the file holds (Q + K) R numbers of a head in place of Q K.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.kernels.factors import factor

_FACTOR = torch.ops.attnopt.factor.default


class _Varies(Exception):
    """A value is no constant."""


def write_factors(module: fx.GraphModule, held: Mapping[str, Tensor]) -> int:
    """Put numbers in the place of the factors that follow from constants; how many there were.

    held: the tensors by the name of the placeholder that brings them.
    """
    known: dict[fx.Node, Any] = {}
    nodes = [n for n in module.graph.nodes if n.op == "call_function" and n.target is _FACTOR]
    done = 0
    with torch.no_grad():
        for node in nodes:
            tensors, lengths, text = node.args
            try:
                if "numbers" in json.loads(text):
                    device = node.meta["val"].device
                    found = factor([torch.empty(0, device=device)], [], text)
                else:
                    found = factor(_value(tensors, module, held, known), [], text)
            except _Varies:
                continue
            name = f"_factor_{done}"
            module.register_buffer(name, found.contiguous(), persistent=False)
            with module.graph.inserting_before(node):
                made = module.graph.get_attr(name)
            made.meta["val"] = node.meta.get("val")
            node.replace_all_uses_with(made)
            module.graph.erase_node(node)
            done += 1
    if done:
        module.graph.eliminate_dead_code()
        module.recompile()
    return done


def _value(given: Any, module: fx.GraphModule, held: Mapping[str, Tensor],
           known: dict[fx.Node, Any]) -> Any:
    """An argument with the values of its nodes. Raises _Varies where one depends on more than the
    constants."""
    return fx.node.map_arg(given, lambda node: _of(node, module, held, known))


def _of(node: fx.Node, module: fx.GraphModule, held: Mapping[str, Tensor],
        known: dict[fx.Node, Any]) -> Any:
    if node not in known:
        known[node] = _computed(node, module, held, known)
    return known[node]


def _computed(node: fx.Node, module: fx.GraphModule, held: Mapping[str, Tensor],
              known: dict[fx.Node, Any]) -> Any:
    if node.op == "placeholder" and node.name in held:
        return held[node.name]
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(module)
    target: Any = node.target
    if node.op != "call_function" or (isinstance(target, torch._ops.OpOverload) and (
            torch.Tag.nondeterministic_seeded in target.tags or target._schema.is_mutable)):
        raise _Varies
    return target(*_value(node.args, module, held, known),
                  **_value(node.kwargs, module, held, known))
