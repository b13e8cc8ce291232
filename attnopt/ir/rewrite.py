"""Rewrite: a small fx graph of ATen ops and attention calls that replaces a Region.

Its placeholders are the region's inputs by name; its outputs replace the region's outputs, in
order. It is how a rule says more than a Spec: folded projections, merges by log-sum-exp, shared
maps, associativity, head compaction.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from attnopt.ir.spec import Schedule, Spec

_OP = "attnopt.attention.default"


@dataclass
class Rewrite:
    """`graph` computes the outputs from the inputs; `specs` are the attention calls inside it.

    predicted: seconds (original, rewritten) by the cost model, or None where it has no say.
    exact:     False for an approximation the user asked for; `bound` then says what was met.
    """

    graph: fx.Graph
    inputs: tuple[str, ...]
    specs: tuple[Spec, ...] = ()
    schedule: Schedule = field(default_factory=Schedule)
    predicted: tuple[float, float] | None = None
    exact: bool = True
    bound: str = ""

    def __post_init__(self) -> None:
        if not self.specs:
            self.specs = tuple(Spec.parse(n.args[4]) for n in self.graph.nodes if _is_call(n))

    @staticmethod
    def of(function: Callable[..., Any], inputs: Sequence[str], **more: Any) -> Rewrite:
        """Trace `function` (plain torch and `attention` calls, no control flow on values)."""
        graph = fx.Tracer().trace(function)
        names = [n.target for n in graph.nodes if n.op == "placeholder"]
        if names != list(inputs):
            raise ValueError(f"inputs must be the function's parameters {names}, got {inputs}")
        return Rewrite(graph, tuple(inputs), **more)

    @staticmethod
    def of_spec(spec: Spec, schedule: Schedule | None = None) -> Rewrite:
        """A bare Spec as a Rewrite of one site: inputs query, key, value, then the operands."""
        graph = fx.Graph()
        names = ("query", "key", "value", *(o.slot for o in spec.operands))
        nodes = [graph.placeholder(name) for name in names]
        call = graph.call_function(
            torch.ops.attnopt.attention.default,
            (*nodes[:3], nodes[3:], str(spec), str(schedule) if schedule else ""))
        graph.output((graph.call_function(operator.getitem, (call, 0)),))
        return Rewrite(graph, names, (spec,), schedule or Schedule())

    def evaluate(self, inputs: Mapping[str, torch.Tensor],
                 attention: Callable[..., Any] | None = None) -> Any:
        """Run the graph on tensors by name; float64 inputs make it its own reference.

        attention: (query, key, value, operands, spec) -> (out, lse), in place of the op.
        """
        module = fx.GraphModule(torch.nn.Module(), self.graph)
        missing = [name for name in self.inputs if name not in inputs]
        if missing:
            raise ValueError(f"inputs must have {list(self.inputs)}, got no {missing}")
        return _Interpreter(module, attention).run(*(inputs[name] for name in self.inputs))


def _is_call(node: fx.Node) -> bool:
    return node.op == "call_function" and str(node.target) == _OP


def attention(query: Any, key: Any, value: Any, operands: Sequence[Any] = (),
              spec: Spec | None = None, schedule: Schedule | None = None) -> Any:
    """The attention call for functions that `Rewrite.of` traces: (out, lse) of a Spec."""
    return torch.ops.attnopt.attention.default(
        query, key, value, list(operands), str(spec or Spec()), str(schedule) if schedule else "")


class _Interpreter(fx.Interpreter):
    """Runs a graph with another function in place of the attention op."""

    def __init__(self, module: fx.GraphModule, attention: Callable[..., Any] | None) -> None:
        super().__init__(module)
        self.attention = attention

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if self.attention and str(target) == _OP:
            return self.attention(*args[:4], Spec.parse(args[4]))
        return super().call_function(target, args, kwargs)
