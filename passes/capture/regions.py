"""Gradient-mode and autocast regions as flat nodes.

torch.export wraps the author's `no_grad` and `autocast` regions into sub-graphs. Here they are
inlined again between two nodes, `enter_grad_mode` and `leave_grad_mode` (the same for autocast),
so that every pass sees one flat graph. Leaving restores what was before, as the author's context
manager does, so one graph serves callers with gradients on and off.

Every node gets `meta["attnopt_region"]`, equal for nodes of one region. A pass may replace nodes
within a region; it must not move one out of it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx.node import has_side_effect

REGION = "attnopt_region"
_WRAP_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
_WRAP_AUTOCAST = torch.ops.higher_order.wrap_with_autocast


@has_side_effect
def enter_grad_mode(mode: bool) -> bool:
    """Set the gradient mode and return the one before."""
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(mode)
    return before


@has_side_effect
def leave_grad_mode(before: bool) -> None:
    """Restore the gradient mode."""
    torch._C._set_grad_enabled(before)


@has_side_effect
def enter_autocast(device: str, dtype: Any, enabled: bool, cache: Any) -> Any:
    """Enter an autocast region and return its context manager."""
    region = torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache)
    region.__enter__()
    return region


@has_side_effect
def leave_autocast(region: Any) -> None:
    """Leave an autocast region."""
    region.__exit__(None, None, None)


_ENTER_LEAVE = {_WRAP_GRAD: (enter_grad_mode, leave_grad_mode, 1),
                _WRAP_AUTOCAST: (enter_autocast, leave_autocast, 4)}


def inline_regions(module: fx.GraphModule) -> bool:
    """Inline the regions of a training-IR graph in place; whether there were any.

    Raises:
        ValueError: a region's sub-graph is not a plain graph module.
    """
    new = fx.Graph()
    copier = _Copier(new, module)
    copier.copy(module, {}, ())
    if copier.regions:
        module.graph = new
        for name, _ in list(module.named_children()):
            if not any(n.op in ("get_attr", "call_module") and n.target == name
                       for n in new.nodes):
                delattr(module, name)
    module.recompile()
    return copier.regions > 0


class _Copier:
    """Copies graph modules into one graph, regions inlined."""

    def __init__(self, graph: fx.Graph, root: fx.GraphModule) -> None:
        self.graph = graph
        self.root = root
        self.regions = 0

    def copy(self, module: fx.GraphModule, env: dict[fx.Node, Any], region: tuple[int, ...]) -> Any:
        """Copy all nodes; `env` maps the module's placeholders (outside the root). The values of
        its output, already mapped, are returned."""
        for node in module.graph.nodes:
            if node.op == "placeholder" and node in env:
                continue
            if node.op == "output":
                mapped = fx.map_arg(node.args[0], env.__getitem__)
                if region:
                    return mapped
                self.graph.output(mapped).meta = dict(node.meta)
                return mapped
            if node.op == "call_function" and node.target in _ENTER_LEAVE:
                env[node] = self._inline(node, module, env, region)
            elif isinstance(_mapped_tuple(node, env), tuple):
                env[node] = _mapped_tuple(node, env)[node.args[1]]
            elif node.op == "get_attr" and _only_regions(node):
                continue
            else:
                env[node] = self.graph.node_copy(node, env.__getitem__)
                if node.op == "get_attr" and module is not self.root:
                    env[node].target = self._adopt(module, str(node.target))
                env[node].meta = {**node.meta, REGION: region}
        return None

    def _adopt(self, module: fx.GraphModule, name: str) -> str:
        """Hang what a region's graph holds as an attribute onto the root, under a free name."""
        free = next(f"{name}_{i}" for i in range(10**6) if not hasattr(self.root, f"{name}_{i}"))
        setattr(self.root, free, getattr(module, name))
        return free

    def _inline(self, node: fx.Node, module: fx.GraphModule, env: dict[fx.Node, Any],
                region: tuple[int, ...]) -> Any:
        enter, leave, count = _ENTER_LEAVE[node.target]
        settings, body, operands = node.args[:count], node.args[count], node.args[count + 1:]
        inner = getattr(module, str(body.target)) if isinstance(body, fx.Node) else body
        if not isinstance(inner, fx.GraphModule):
            raise ValueError(f"a region must be a graph module, got {type(inner).__name__}")
        self.regions += 1
        tag = (*region, self.regions)
        opened = self._call(enter, settings, node, tag)
        inner_env = dict(zip([n for n in inner.graph.nodes if n.op == "placeholder"],
                             [env[o] if isinstance(o, fx.Node) else o for o in operands],
                             strict=True))
        results = self.copy(inner, inner_env, tag)
        self._call(leave, (opened,), node, tag)
        return results

    def _call(self, function: Any, args: Any, node: fx.Node, region: tuple[int, ...]) -> fx.Node:
        call = self.graph.call_function(function, args)
        call.meta = {k: node.meta[k] for k in ("stack_trace", "nn_module_stack") if k in node.meta}
        call.meta |= {"val": None, REGION: region}
        return call


def _mapped_tuple(node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    """The results of the region that a getitem node reads, else None."""
    if node.op == "call_function" and node.target is operator.getitem:
        return env.get(node.args[0])
    return None


def _only_regions(node: fx.Node) -> bool:
    return bool(node.users) and all(u.target in _ENTER_LEAVE for u in node.users)
