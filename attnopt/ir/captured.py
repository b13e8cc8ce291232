"""Captured: one graph of a model as its author wrote it, and where each of its tensors comes from.

Both front ends (torch.export and Dynamo) arrive as this one type. The graph is the author's program
with its in-place operations: running it with the values of its placeholders is the author's call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx
from torch.utils import _pytree as pytree

OriginKind = Literal["input", "parameter", "buffer", "constant"]


@dataclass(frozen=True)
class Origin:
    """Where the value of a placeholder comes from at each call.

    kind: "input" (of the user), "parameter", "buffer", or "constant" (a tensor that a module keeps
          as a plain attribute, or a literal that the author's code makes)
    path: dotted path in the model; of an input the argument's name; of a literal its name
    held: whether a module holds the tensor under `path`; false for inputs and literals
    """

    kind: OriginKind
    path: str
    held: bool = True


@dataclass(frozen=True)
class SizeRange:
    """Lowest and highest value of a symbolic size for which the graph is right."""

    low: int
    high: int | None = None

    def __str__(self) -> str:
        return f"{self.low}..{'' if self.high is None else self.high}"


@dataclass
class Captured:
    """A graph with origins.

    graph_module: training-IR graph. Its placeholders are the tensors that were lifted out of the
        model, then the flat user inputs (Dynamo graphs mix them). Meta of a node: "val" (fake
        tensors), "stack_trace", "nn_module_stack", and "attnopt_region", an opaque tag that is
        equal for nodes of one gradient-mode region: nothing may move from one region to another.
    origins: by placeholder name, in the placeholders' order.
    values: by placeholder name, the value it had at capture: lifted tensors by reference, the
        user's example inputs as they were given. Running the graph on them writes in place what
        the model writes in place.
    in_spec, out_spec: tree specs of (args, kwargs) and of the result; None from Dynamo, whose
        graphs take and return flat values.
    symbols: by name of a symbolic size, the range in which the graph is right.
    conditions: what else must hold of the symbolic sizes, as Python expressions over their names.
    front_end: "export" or "dynamo".
    model_name: class name of the model.
    notes: sentences for the report.
    training: whether any module was in training mode; Dynamo graphs do not tell.
    """

    graph_module: fx.GraphModule
    origins: dict[str, Origin]
    values: dict[str, Any]
    in_spec: pytree.TreeSpec | None = None
    out_spec: pytree.TreeSpec | None = None
    symbols: Mapping[str, SizeRange] = field(default_factory=dict)
    conditions: tuple[str, ...] = ()
    front_end: Literal["export", "dynamo"] = "export"
    model_name: str = ""
    notes: tuple[str, ...] = ()
    training: bool = False

    @property
    def graph(self) -> fx.Graph:
        """The graph of `graph_module`."""
        return self.graph_module.graph

    @property
    def placeholders(self) -> list[fx.Node]:
        """The placeholder nodes, in calling order."""
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    def origin(self, node: fx.Node) -> Origin | None:
        """Origin of a placeholder node; None for every other node."""
        return self.origins.get(node.name) if node.op == "placeholder" else None

    def value(self, node: fx.Node | str) -> Any:
        """What the placeholder held at capture."""
        return self.values[node if isinstance(node, str) else node.name]

    def arguments(self, *, clone: bool = False) -> list[Any]:
        """The placeholders' values in calling order; `clone` for a run that must not be seen by
        the user (one that shares tensor values but writes into copies of them)."""
        copies: dict[int, torch.Tensor] = {}

        def own(value: Any) -> Any:
            if not clone or not isinstance(value, torch.Tensor):
                return value
            if id(value) not in copies:
                copies[id(value)] = value.detach().clone().requires_grad_(value.requires_grad)
            return copies[id(value)]

        return [own(self.values[name]) for name in self.origins]

    def __str__(self) -> str:
        kinds = [o.kind for o in self.origins.values()]
        counts = ", ".join(f"{kinds.count(k)} {k}s" for k in dict.fromkeys(kinds))
        calls = sum(n.op == "call_function" for n in self.graph.nodes)
        return f"Captured({self.model_name}, {self.front_end}, {calls} operations, {counts})"
