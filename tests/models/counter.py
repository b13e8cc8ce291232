"""Counts the softmax and SDPA nodes of a model, without any of attnopt's own code.

The sweep holds the report of `attnopt.optimize` against this count, so nothing here may share code
with the recogniser: the graph is a plain `torch.export`, the nodes are counted by their operator,
and what is dead is found by following storages back from the outputs. Where torch.export cannot
capture a model, the calls of one eager run are counted instead.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

SOFTMAX = (
    "aten::softmax", "aten::_softmax", "aten::_safe_softmax", "aten::special_softmax",
    "aten::_masked_softmax",
)
SDPA = (
    "aten::scaled_dot_product_attention", "aten::_scaled_dot_product_attention_math",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention", "aten::_native_multi_head_attention",
    "aten::_transformer_encoder_layer_fwd",
)


@dataclass
class Count:
    """Nodes by the dotted path of the module that made them; `dead` reach no output."""

    live: Counter[str] = field(default_factory=Counter)
    dead: Counter[str] = field(default_factory=Counter)
    sdpa: int = 0
    #: False if the model could not be exported, so that the calls of an eager run were counted
    exported: bool = True
    #: what torch.export took
    seconds: float = 0.0

    @property
    def total(self) -> int:
        return sum(self.live.values())


def _schema_name(node: fx.Node) -> str:
    target = node.target
    return target._schema.name if isinstance(target, torch._ops.OpOverload) else ""


def _path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    return path.removeprefix("L['self']").lstrip(".").partition("@")[0]


def _nested(graph: fx.GraphModule) -> Iterator[fx.Graph]:
    """The graph and those of its grad-mode, autocast and other sub-graphs."""
    yield graph.graph
    for child in graph.children():
        if isinstance(child, fx.GraphModule):
            yield from _nested(child)


def _storage(node: fx.Node) -> fx.Node:
    """The node that owns the storage which this node's result is a view of."""
    while isinstance(node.target, torch._ops.OpOverload):
        views = [
            argument
            for place, argument in enumerate(node.target._schema.arguments)
            if argument.alias_info is not None and place < len(node.args)
            and isinstance(node.args[place], fx.Node)
        ]
        if not views:
            break
        node = node.args[node.target._schema.arguments.index(views[0])]  # type: ignore[assignment]
    return node


def _written(node: fx.Node) -> Iterator[fx.Node]:
    if isinstance(node.target, torch._ops.OpOverload):
        for place, argument in enumerate(node.target._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                keyword = node.kwargs.get(argument.name)
                value = node.args[place] if place < len(node.args) else keyword
                if isinstance(value, fx.Node):
                    yield value


def _live(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that an output depends on; a write counts when the storage written to does."""
    live: set[fx.Node] = set()
    writers = [(node, _storage(target)) for node in graph.nodes for target in _written(node)]
    todo = [node for node in graph.nodes if node.op == "output"]
    while todo:
        node = todo.pop()
        if node in live:
            continue
        live.add(node)
        todo.extend(node.all_input_nodes)
        storage = _storage(node)
        todo.extend(writer for writer, target in writers if target is storage)
    return live


class _Calls(TorchFunctionMode):
    """Counts softmax and SDPA calls of an eager run by function name."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax = 0
        self.sdpa = 0
        self._inside = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if self._inside or name not in ("softmax", "scaled_dot_product_attention"):
            return func(*args, **(kwargs or {}))
        self.softmax += name == "softmax"
        self.sdpa += name != "softmax"
        self._inside = True  # F.softmax calls Tensor.softmax: one call, not two
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._inside = False


def count(model: nn.Module, kwargs: dict[str, Any]) -> Count:
    """Counts the softmax and SDPA nodes of `model(**kwargs)`, live ones apart from dead ones."""
    start = time.perf_counter()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        program = torch.export.export(model, (), kwargs, strict=False)
    except Exception:
        calls = _Calls()
        with calls, torch.no_grad():
            model(**kwargs)
        total = calls.softmax + calls.sdpa
        return Count(live=Counter({"": total}), sdpa=calls.sdpa, exported=False)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    result = Count(seconds=time.perf_counter() - start)
    for graph in _nested(program.graph_module):
        live = _live(graph)
        for node in graph.nodes:
            name = _schema_name(node)
            if name in SOFTMAX or name in SDPA:
                (result.live if node in live else result.dead)[_path(node)] += 1
                result.sdpa += name in SDPA and node in live
    return result
