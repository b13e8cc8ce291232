"""Helpers: capture a function as a functional graph, lift its outputs, evaluate the lift."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from attnopt.ir.evaluate import Env, evaluate
from attnopt.ir.expr import Expr
from attnopt.passes.analyze.lift import Lifter
from attnopt.passes.analyze.provenance import Analysis, Finding
from attnopt.passes.normalize import functional_view

AXES = ("b", "h", "q", "k")


@dataclass
class Program:
    """A captured module: its functional graph, origins of placeholders, results in order."""

    graph: fx.Graph
    kinds: dict[str, str]
    tensors: dict[str, Tensor]
    results: list[fx.Node]

    @property
    def inputs(self) -> dict[str, fx.Node]:
        return {n.name: n for n in self.graph.nodes if n.op == "placeholder"}

    def lifter(self, lengths: dict[str, Any]) -> Lifter:
        return Lifter(self.graph, self.kinds, self.tensors.get, lengths)

    def analysis(self) -> Analysis:
        return Analysis(self.graph, self.kinds, self.tensors.get)


def module(forward: Callable[..., Any], setup: Callable[[Any], None] | None = None) -> nn.Module:
    made = type("Program", (nn.Module,), {"forward": forward})()
    if setup is not None:
        setup(made)
    return made.eval()


def capture(program: nn.Module, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None,
            dynamic: Any = None) -> Program:
    """torch.export's training graph, made functional."""
    exported = torch.export.export(program, args, kwargs, strict=False, dynamic_shapes=dynamic)
    graph = functional_view(exported.graph).graph
    kinds, tensors = {}, {}
    for spec in exported.graph_signature.input_specs:
        name = spec.arg.name
        kinds[name] = {"USER_INPUT": "input", "PARAMETER": "parameter",
                       "BUFFER": "buffer"}.get(spec.kind.name, "constant")
        if kinds[name] in ("buffer", "constant"):
            held = exported.constants.get(spec.target)
            tensors[name] = exported.state_dict[spec.target] if held is None else held
    output = next(n for n in graph.nodes if n.op == "output").args[0]
    return Program(graph, kinds, tensors, list(output))


def values_of(program: Program, args: Sequence[Tensor]) -> dict[str, Tensor]:
    """The value of every node when the functional graph runs on `args`."""
    seen: dict[str, Any] = {}
    given = iter(args)

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            seen[n.name] = super().run_node(n)
            return seen[n.name]

    inputs = [program.tensors[name] if name in program.tensors else next(given)
              for name in program.inputs]
    Recorder(fx.GraphModule({}, program.graph)).run(*inputs)
    return seen


def layout_of(node: fx.Node) -> tuple[str | None, ...]:
    """Dimensions follow the last of (b, h, q, k); those of length 1 follow none."""
    shape = node.meta["val"].shape
    return tuple(None if n == 1 else axis
                 for n, axis in zip(shape, AXES[len(AXES) - len(shape):], strict=True))


def value(e: Expr, shape: Sequence[int], operands: dict[str, Tensor] | None = None) -> Tensor:
    """The lift on a whole grid of (b, h, q, k), in float64 where it is a float."""
    full = (1,) * (4 - len(shape)) + tuple(shape)
    got = torch.as_tensor(evaluate(e, Env(full, operands or {}, dtype=torch.float64)))
    return got.expand(full).reshape(tuple(shape))


def find(forward: Callable[..., Any], *, sizes: tuple[int, int] = (8, 12), role: str = "",
         setup: Callable[[Any], None] | None = None, extra: tuple[Tensor, ...] = (),
         dynamic: bool = False, extra_dims: tuple[dict[int, Any], ...] = ()) -> Finding:
    """The finding for the one operand that `forward(self, query, key, *extra)` returns."""
    query, key = (torch.zeros(2, 4, n, 16) for n in sizes)
    auto = torch.export.Dim.AUTO
    moving = ({0: auto, 2: auto}, {0: auto, 2: auto}, *extra_dims)

    def only(self: Any, query: Tensor, key: Tensor, *more: Tensor) -> list[Tensor]:
        return [forward(self, query, key, *more)]

    names = {1: _one, 0: _none, 2: _two}[len(extra)](only)
    program = capture(module(names, setup), (query, key, *extra),
                      dynamic=moving if dynamic else None)
    return judge(program, program.results[0], role)


def _none(only: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, query, key: only(self, query, key)


def _one(only: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, query, key, first: only(self, query, key, first)


def _two(only: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, query, key, first, second: only(self, query, key, first, second)


def judge(program: Program, node: fx.Node, role: str = "") -> Finding:
    """The finding for a node of a program whose first inputs are `query` and `key`."""
    query, key = (program.inputs[n].meta["val"].shape for n in ("query", "key"))
    lengths = {"b": query[0], "h": query[1], "q": query[2], "k": key[2]}
    if not role:
        role = "keep" if node.meta["val"].dtype == torch.bool else "additive"
    return program.analysis().operand(node, layout_of(node), role, lengths)
