"""Program: facts about a whole functional view that recognition asks for again and again.

For each node: is it live, does it depend on an input, a parameter, or on constants alone, and
which *sources* (contractions, softmaxes, linears) reach it through pointwise, layout and reduction
operations only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from attnopt.passes.normalize import View, op_name
from attnopt.passes.recognize.heads import head_mix
from attnopt.passes.recognize.layout import LAYOUT_OPS
from attnopt.passes.recognize.pointwise import is_cast, is_pointwise
from attnopt.passes.recognize.scores import raw_score

SOFTMAX = frozenset(("softmax", "_softmax", "special_softmax", "log_softmax", "_log_softmax",
                     "special_log_softmax"))
#: meta of a softmax whose moved scores or weights could not be put back: why
UNMOVED = "attnopt_unmoved"
SDPA = frozenset(("scaled_dot_product_attention",))
REDUCTIONS = frozenset(("sum", "amax", "max", "logsumexp"))
_CARRIERS = REDUCTIONS | LAYOUT_OPS | frozenset((
    "cat", "concat", "slice", "narrow", "select", "select_scatter", "slice_scatter", "fill",
    "copy", "dropout", "detach", "tril", "triu", "getitem", "norm", "linalg_vector_norm",
    "split", "split_with_sizes", "chunk", "index_put",
))
_MOST_SOURCES = 24

INPUT, PARAMETER, BUFFER, CONSTANT = "input", "parameter", "buffer", "constant"


class Program:
    """Facts about `view`; `kinds` says of each placeholder what it is, `value_of` its tensor."""

    def __init__(self, view: View, kinds: Mapping[str, str],
                 value_of: Callable[[str], torch.Tensor | None] = lambda name: None) -> None:
        self.view = view
        self.kinds = kinds
        self.value_of = value_of
        self.nodes = list(view.graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.live = self._live()
        self.depends: dict[fx.Node, frozenset[str]] = {}
        self.sources: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in self.nodes:
            self._learn(node)

    def _live(self) -> set[fx.Node]:
        live: set[fx.Node] = set()
        stack = [*self.view.left_behind]
        stack += [n for n in self.nodes if n.op == "output" or (n.op == "call_function"
                                                                and n.is_impure())]
        while stack:
            node = stack.pop()
            if node not in live:
                live.add(node)
                stack.extend(node.all_input_nodes)
        return live

    def _learn(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.depends[node] = frozenset((self.kinds.get(node.name, INPUT),))
        else:
            self.depends[node] = frozenset().union(
                *(self.depends.get(n, frozenset()) for n in node.all_input_nodes))
        if node.op != "call_function" or node.meta.get("attnopt_opaque"):
            self.sources[node] = frozenset()
        elif op_name(node) in SOFTMAX or op_name(node) == "linear" \
                or raw_score(node) is not None:
            self.sources[node] = frozenset((node,)) | self._mixed(node)
        elif op_name(node).startswith("conv"):
            self.sources[node] = self._mixed(node)
        elif carries(node):
            found = frozenset().union(*(self.sources[n] for n in node.all_input_nodes))
            if len(found) > _MOST_SOURCES:
                newest = sorted(found, key=self.order.__getitem__)[-_MOST_SOURCES:]
                found = frozenset(newest)
            self.sources[node] = found
        else:
            self.sources[node] = frozenset()

    def _mixed(self, node: fx.Node) -> frozenset[fx.Node]:
        """Sources that reach `node` through a mixing of heads by a parameter."""
        mix = head_mix(node)
        if mix is None or self.on_input(mix.matrix):
            return frozenset()
        return self.sources[mix.source]

    def users(self, node: fx.Node) -> list[fx.Node]:
        return [user for user in node.users if user in self.live]

    def on_input(self, node: fx.Node) -> bool:
        return INPUT in self.depends[node]

    def constant(self, node: fx.Node) -> bool | int | float | None:
        """The number that every element of `node` is, where the program text says so."""
        name = op_name(node) if node.op == "call_function" else ""
        tensor = node.meta.get("val")
        if not isinstance(tensor, torch.Tensor) or node.meta.get("attnopt_opaque"):
            return None
        number: Any = None
        if node.op == "placeholder":
            if self.kinds.get(node.name) == CONSTANT and tensor.dim() == 0:
                value = self.value_of(node.name)
                number = value.item() if value is not None and "lifted" in node.name else None
        elif name in ("lift_fresh_copy", "lift_fresh", "clone", "detach", "alias", "to", "_to_copy",
                      "expand", "contiguous"):
            number = self.constant(node.args[0])  # type: ignore[arg-type]
        elif name in ("full", "full_like", "new_full"):
            number = node.args[{"full": 1, "full_like": 1, "new_full": 2}[name]]
        elif name == "scalar_tensor":
            number = node.args[0]
        elif name in ("zeros", "zeros_like", "new_zeros"):
            number = 0
        elif name in ("ones", "ones_like", "new_ones"):
            number = 1
        if not isinstance(number, (bool, int, float)):
            return None
        return torch.tensor(number).to(tensor.dtype).item()


def carries(node: fx.Node) -> bool:
    """Does a score or weight keep its identity through this operation?"""
    return is_pointwise(node) or is_cast(node) or op_name(node) in _CARRIERS
