"""A graph as plain data for the report: what it computes, where, and which sites its parts are of.

A node is part of a site when it came or went with it. Which of several sites a node belongs to is
read off the graph: those that came or went are searched breadth first from the node that each site
is known by, along their edges in both directions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from attnopt.ir.site import module_path, source_line

#: reads of attributes say nothing that their users do not say
_SHOWN = frozenset({"call_function", "call_module", "call_method", "placeholder", "output"})


@dataclass(frozen=True)
class NodeRecord:
    """One node; `site` is a place in the report's list of sites, or None for the rest."""

    name: str
    op: str
    shape: str = ""
    dtype: str = ""
    path: str = ""
    source: str = ""
    inputs: tuple[int, ...] = ()
    site: int | None = None


@dataclass(frozen=True)
class GraphRecord:
    """One captured graph as its author has it, and after rewriting."""

    before: tuple[NodeRecord, ...] = ()
    after: tuple[NodeRecord, ...] = ()

    def moved(self, sites: int) -> GraphRecord:
        """The same beside graphs that hold `sites` sites before it."""
        return GraphRecord(*(tuple(
            n if n.site is None else replace(n, site=n.site + sites) for n in nodes)
            for nodes in (self.before, self.after)))


def nodes_of(graph: fx.Graph, op_name: Callable[[fx.Node], str]) -> tuple[NodeRecord, ...]:
    """The nodes of a graph in their order."""
    place: dict[fx.Node, int] = {}
    found: list[NodeRecord] = []
    for node in graph.nodes:
        if node.op not in _SHOWN:
            continue
        value: Any = node.meta.get("val")
        tensor = value if isinstance(value, torch.Tensor) else None
        place[node] = len(found)
        found.append(NodeRecord(
            node.name, op_name(node) if node.op == "call_function" else node.op,
            "" if tensor is None else "x".join(map(str, tensor.shape)),
            "" if tensor is None else str(tensor.dtype).removeprefix("torch."),
            module_path(node), source_line(node),
            tuple(place[i] for i in node.all_input_nodes if i in place)))
    return tuple(found)


def compared(before: Sequence[NodeRecord], after: Sequence[NodeRecord],
             taken: Mapping[str, int], emitted: Mapping[str, int]) -> GraphRecord:
    """Both with their sites marked.

    taken, emitted: the site of nodes of the first and of the second graph, by name.
    """
    kept = {n.name for n in before} & {n.name for n in after}
    return GraphRecord(_marked(before, kept, taken), _marked(after, kept, emitted))


def _marked(nodes: Sequence[NodeRecord], kept: set[str], known: Mapping[str, int],
            ) -> tuple[NodeRecord, ...]:
    beside: dict[int, list[int]] = {i: [] for i in range(len(nodes))}
    for i, node in enumerate(nodes):
        for j in node.inputs:
            beside[i].append(j)
            beside[j].append(i)
    site = {i: known[n.name] for i, n in enumerate(nodes) if n.name in known}
    queue = deque(site)
    while queue:
        i = queue.popleft()
        for j in beside[i]:
            if j not in site and nodes[j].name not in kept:
                site[j] = site[i]
                queue.append(j)
    return tuple(replace(n, site=site.get(i)) for i, n in enumerate(nodes))
