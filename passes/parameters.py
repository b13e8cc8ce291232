"""What a graph computes from parameters and buffers alone, and that once for all that use it.

A bias that depends on no input (T5's buckets, an MLP over log-distances as in SwinV2 (Liu et al.,
2022), an interpolated position table) is often computed again by each layer that shares its
parameters, and a rewrite adds a table for each site. `share` lets equal computations be one. In
training the parameter still gets the gradients of all uses: they are summed at the shared value,
in place of at the parameter.

An operation takes part where it draws no random numbers, and where neither its result nor any other
view of that memory is written to or returned: whoever got the result would see the change of
another. Whole numbers made of lengths are equal where their symbolic value is.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable
from typing import Any

import torch
from torch import fx

from attnopt import kernels
from attnopt.ir.captured import Captured
from attnopt.passes.normalize import _aliased, op_name, writes

_MADE_UP = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided",
            "empty_permuted")
#: namespaces of operators whose tags and schemas say all that they do; others may draw or count
_KNOWN = ("aten", "prims", "attnopt")
#: with prefer="memory": bytes of a value that may be kept through the whole forward
FEW_BYTES = 1 << 20


class ParameterCone:
    """Which nodes of a captured graph, as it is now, depend on no input's values.

    leaves: node -> placeholders that it depends on, for those nodes; a node that depends on lengths
            of inputs is among them
    sized:  those that do depend on lengths
    """

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.roots: dict[fx.Node, fx.Node] = {}
        for node in captured.graph.nodes:
            parent = _aliased(node)
            self.roots[node] = node if parent is None else self.roots[parent]
        self.exposed = self._exposed()
        self.leaves: dict[fx.Node, frozenset[str]] = {}
        self.sized: set[fx.Node] = set()
        for node in captured.graph.nodes:
            self._learn(node)

    def _exposed(self) -> set[fx.Node]:
        """Owners of memory that is written to or returned."""
        found: set[fx.Node] = set()
        for node in self.captured.graph.nodes:
            if node.op == "output":
                found.update(self.roots[n] for n in node.all_input_nodes)
            elif node.op == "call_function" and _writes(node):
                found.add(self.roots[node])
                found.update(self.roots[n] for n in node.all_input_nodes)
        # Placeholders can share memory without being views of each other in the graph.
        written = {_storage(self.captured.values.get(n.name)) for n in found
                   if n.op == "placeholder"} - {None}
        return found | {n for n in self.captured.placeholders
                        if _storage(self.captured.values.get(n.name)) in written}

    def _learn(self, node: fx.Node) -> None:
        val = node.meta.get("val")
        if node.op == "placeholder":
            origin = self.captured.origins[node.name]
            if origin.kind != "input" and self.roots[node] not in self.exposed:
                self.leaves[node] = frozenset((node.name,))
        elif isinstance(val, (torch.SymInt, int)) and not isinstance(val, bool):
            if _backed(val):
                self.leaves[node] = frozenset()
                self.sized.add(node)
        elif node.op == "call_function" and _pure(node) and self.roots[node] not in self.exposed \
                and all(n in self.leaves for n in node.all_input_nodes):
            self.leaves[node] = frozenset().union(*(self.leaves[n] for n in node.all_input_nodes))
            if any(n in self.sized for n in node.all_input_nodes):
                self.sized.add(node)


def share(captured: Captured, prefer: str = "speed") -> int:
    """Let equal computations of parameters alone be one, in place; how many became superfluous.

    With `prefer="memory"` nothing large is kept for a later use, where that would not be kept for
    a backward pass anyway.
    """
    cone = ParameterCone(captured)
    known: dict[Hashable, fx.Node] = {}
    gone: list[fx.Node] = []
    for node in captured.graph.nodes:
        if node.op != "call_function" or node not in cone.leaves or not (
                captured.training or prefer != "memory" or _small(node)):
            continue
        first = known.setdefault(_key(node), node)
        if first is not node:
            node.replace_all_uses_with(first)
            gone.append(node)
    for node in reversed(gone):
        captured.graph.erase_node(node)
    return sum(isinstance(n.meta.get("val"), torch.Tensor) and _aliased(n) is None for n in gone)


def _key(node: fx.Node) -> Hashable:
    val = node.meta.get("val")
    if isinstance(val, torch.SymInt):
        return "length", str(val.node.expr)
    args = node.args
    if node.target is torch.ops.attnopt.tabulate.default:
        args = (*args[:2], kernels.tabulate.same_text(args[2]))
    return (node.target, node.meta.get("attnopt_region"), _hashable(args),
            tuple((name, _hashable(given)) for name, given in sorted(node.kwargs.items())))


def _hashable(argument: Any) -> Hashable:
    if isinstance(argument, fx.Node):
        return argument
    if isinstance(argument, (list, tuple)):
        return tuple(map(_hashable, argument))
    if isinstance(argument, slice):
        return "slice", *map(_hashable, (argument.start, argument.stop, argument.step))
    return type(argument), repr(argument)  # 1, 1.0 and True are equal, and 0.0 is -0.0


def _small(node: fx.Node) -> bool:
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor):
        return True
    sizes = [n for n in val.shape if isinstance(n, int)]
    count = 1
    for n in sizes:
        count *= n
    return len(sizes) == val.dim() and count * val.element_size() <= FEW_BYTES


def _pure(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or op_name(node) in _MADE_UP:
        return False
    if node.target.namespace not in _KNOWN:
        return False
    random = torch.Tag.nondeterministic_seeded in node.target.tags
    return not random and not node.is_impure() and not _writes(node)


def _writes(node: fx.Node) -> bool:
    if writes(node):
        return True
    return isinstance(node.target, torch._ops.OpOverload) and bool(
        node.target._schema.is_mutable)


def _backed(val: torch.SymInt | int) -> bool:
    """Whether a whole number follows from lengths, not from what a tensor holds."""
    return isinstance(val, int) or not any(
        str(s).startswith("u") for s in val.node.expr.free_symbols)


def _storage(value: Any) -> int | None:
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return None
    try:
        return value.untyped_storage().data_ptr() or None
    except RuntimeError:  # a tensor without memory
        return None
