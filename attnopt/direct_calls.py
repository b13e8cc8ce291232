"""The same graph with direct calls, for small models where the calls themselves cost.

`torch.ops.aten.add.Tensor(x, y)` finds its operator by four attribute look-ups, enters a Python
function and converts its arguments by the operator's schema; `torch.add(x, y)` is a native function
with a fast argument parser that ends in the very same operator: 2 to 5 microseconds less a call.
Only such pairs are listed for which the native function takes the operator's arguments in the same
order and can resolve to no other overload.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from attnopt.kernels import lifetimes, ops, tabulate, window_maps

_NN = torch._C._nn
_T = torch.Tensor

#: names of functions of `torch` that take the arguments of the overload named
_OF_TORCH = (
    "add.Tensor sub.Tensor mul.Tensor div.Tensor matmul bmm mm addmm baddbmm softmax.int relu "
    "tanh sigmoid exp log sqrt rsqrt neg abs cos sin erf layer_norm group_norm dropout "
    "batch_norm conv1d conv2d conv3d transpose.int unsqueeze squeeze.dim permute reshape "
    "select.int t cat stack chunk embedding where.self masked_fill.Scalar masked_fill.Tensor "
    "clone tril triu cumsum flatten.using_ints bitwise_and.Tensor bitwise_not logical_not "
    "eq.Tensor ne.Tensor lt.Tensor le.Tensor gt.Tensor ge.Tensor pow.Tensor_Scalar mean.dim "
    "index_select gather "
).split()
_OF_NN = "linear gelu silu scaled_dot_product_attention".split()
_OF_TENSOR = "view expand contiguous add_.Tensor mul_.Tensor type_as expand_as".split()


def _table() -> dict[Any, Callable[..., Any]]:
    table: dict[Any, Callable[..., Any]] = {}
    for names, home in ((_OF_TORCH, torch), (_OF_NN, _NN), (_OF_TENSOR, _T)):
        for full in names:
            name, _, overload = full.partition(".")
            packet = getattr(torch.ops.aten, name)
            function = getattr(home, name, None)
            if function is not None and hasattr(packet, overload or "default"):
                table[getattr(packet, overload or "default")] = function
    table[torch.ops.attnopt.key_lifetimes.default] = lifetimes.key_lifetimes
    table[torch.ops.attnopt.tabulate.default] = tabulate.tabulated
    return table


_DIRECT = _table()


def with_direct_calls(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph module that shares its attributes and calls native functions directly."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if _is_output_of_attention(node):
            copies[node] = copies[node.args[0]]
            continue
        if node.target is ops.attention and not node.kwargs and all(
                map(_is_output_of_attention, node.users)):
            copies[node] = _attend(graph, node, copies)
            continue
        if node.target is window_maps.window_attention and not node.kwargs:
            *tensors, operands, spec, schedule, places = fx.map_arg(
                node.args, copies.__getitem__)
            copies[node] = graph.call_function(
                window_maps.attend_windows, (spec, schedule, places, *tensors, *operands))
            continue
        copy = graph.node_copy(node, copies.__getitem__)
        copies[node] = copy
        if node.op != "call_function" or node.target not in _DIRECT:
            continue
        if all(_positional(argument) for argument in (*node.args, *node.kwargs.values())):
            copy.target = _DIRECT[node.target]
    return fx.GraphModule(module, graph, class_name=type(module).__name__)


def _attend(graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    query, key, value, operands, spec, *schedule = fx.map_arg(node.args, copies.__getitem__)
    return graph.call_function(
        ops.attend, (spec, schedule[0] if schedule else "", query, key, value, *operands))


def _is_output_of_attention(node: fx.Node) -> bool:
    """Whether a node is `out` of an attention of which nothing else is used."""
    if node.target is not operator.getitem or node.args[1] != 0:
        return False
    source = node.args[0]
    return (isinstance(source, fx.Node) and source.target is ops.attention
            and not source.kwargs
            and all(u.target is operator.getitem and u.args[1] == 0 for u in source.users))


def _positional(argument: Any) -> bool:
    """Whether an argument is of a kind that the native parser reads as the operator would."""
    if isinstance(argument, (list, tuple)):
        return all(_positional(entry) for entry in argument)
    return argument is None or isinstance(argument, (fx.Node, bool, int, float, str, torch.dtype))
