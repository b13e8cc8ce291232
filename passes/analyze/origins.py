"""Where the numbers of a tensor come from: constants, index arithmetic, parameters, inputs.

Read from the graph alone, so it always has an answer. Constant fills do not count beside anything
else; a user's input stays `input` through views, comparisons and arithmetic, and becomes
`activation` where it meets a contraction, a normaliser or a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from attnopt.passes.analyze.by_value import cone
from attnopt.passes.analyze.lift_rules import RULES
from attnopt.passes.normalize import is_tensor, op_name

PARTS = ("constant", "index", "parameter", "input", "activation")
_POSITIONS = frozenset(("arange", "eye", "tril", "triu", "linspace", "tril_indices",
                        "triu_indices", "one_hot"))
#: Only the type or the shape of these arguments matters.
_SHAPE_ONLY = frozenset((
    "ones_like", "zeros_like", "full_like", "empty_like", "new_ones", "new_zeros", "new_full",
    "new_empty", "rand_like", "randn_like", "zero", "sym_size", "fill"))
_FIRST_ONLY = frozenset(("expand_as", "type_as", "view_as", "reshape_as", "to"))
_COUNTING = frozenset(("any", "all", "cumsum", "sum", "amax", "amin", "argmax", "argmin", "isin",
                       "sort", "argsort", "searchsorted", "bucketize", "max", "min"))
_GATHERS = frozenset(("embedding", "index", "index_select", "gather", "take_along_dim"))


@dataclass(frozen=True)
class Provenance:
    """`parts` of a tensor, a subset of PARTS; `text` for the report, "index & input" and the like.
    """

    parts: frozenset[str]
    text: str


def _plain(parts: frozenset[str]) -> str:
    return "+".join(p for p in PARTS if p in parts) or "constant"


class Origins:
    """Provenance of the nodes of one graph, remembered."""

    def __init__(self, kind_of: Mapping[str, str]) -> None:
        self.kind_of = kind_of
        self._parts: dict[fx.Node, frozenset[str]] = {}

    def of(self, node: fx.Node) -> Provenance:
        """The provenance of a tensor node."""
        parts = self.parts(node) or frozenset(("constant",))
        terms = list(dict.fromkeys(self._words(n) for n in self._terms(node, 16)))
        if len(terms) > 1:
            terms = [t for t in terms if t != "constant"] or terms
        return Provenance(parts, f" {_joint(node)} ".join(terms))

    def parts(self, node: fx.Node) -> frozenset[str]:
        for n in cone(node, self._parts):
            self._parts[n] = self._parts_of(n)
        return self._parts[node]

    def _words(self, node: fx.Node) -> str:
        """The parts of a term, or that a table of parameters is looked up by an input."""
        at = node
        while at.op == "call_function" and at.all_input_nodes and op_name(at) in RULES \
                and op_name(at) not in _GATHERS and len(at.all_input_nodes) == 1:
            at = at.all_input_nodes[0]
        if at.op == "call_function" and op_name(at) in ("embedding", "index", "index_select"):
            table, *places = at.all_input_nodes
            if self.parts(table) == {"parameter"} and any("input" in self.parts(p) for p in places):
                return "parameter by input"
        return _plain(self.parts(node))

    def _parts_of(self, node: fx.Node) -> frozenset[str]:
        val = node.meta.get("val")
        if isinstance(val, torch.SymInt | int):
            return frozenset()
        if node.op == "placeholder" or node.op == "get_attr":
            kind = self.kind_of.get(node.name, "constant")
            if kind in ("buffer", "constant"):
                single = isinstance(val, torch.Tensor) and val.numel() == 1
                return frozenset(() if single else ("constant",))
            return frozenset((kind,))
        if node.op != "call_function":
            return frozenset(("activation",))
        name = op_name(node)
        if name in _SHAPE_ONLY:
            others = node.all_input_nodes[1:] if name in ("fill", "full_like", "new_full") else []
            return frozenset().union(*(self._parts[a] for a in others))
        if name in _FIRST_ONLY:
            return self._parts[node.all_input_nodes[0]]
        found = frozenset().union(*(self._parts[a] for a in node.all_input_nodes))
        if name in _GATHERS and "input" in found:  # mask[arange, arange] is the mask
            found -= {"index"} - self._parts[node.all_input_nodes[0]]
        if name in _POSITIONS:
            found |= {"index"}
        if "input" in found and not self._light(node, name, found):
            return frozenset(("activation",))
        return found

    def _light(self, node: fx.Node, name: str, found: frozenset[str]) -> bool:
        """Does the op keep an input a mask-like thing, rather than compute with it?"""
        if "parameter" in found and (name in _GATHERS or name in ("mul", "div")):
            return False
        if name in _COUNTING:
            source = node.all_input_nodes[0].meta.get("val")
            return not (isinstance(source, torch.Tensor) and source.dtype.is_floating_point)
        pointwise = isinstance(node.target, torch._ops.OpOverload) \
            and torch.Tag.pointwise in node.target.tags
        return name in RULES or pointwise or node.target.__module__ == "_operator"  # type: ignore

    def _terms(self, node: fx.Node, budget: int) -> list[fx.Node]:
        """The parts of a sum or of a conjunction, through casts, views and constant choices."""
        if node.op != "call_function" or budget <= 0:
            return [node]
        inputs = [a for a in node.all_input_nodes if is_tensor(a)]
        varying = [a for a in inputs if self.parts(a)]
        if op_name(node) in _JOINS and len(varying) > 1:
            return [t for a in varying for t in self._terms(a, budget // 2)]
        transparent = op_name(node) in RULES and op_name(node) not in _GATHERS | _POSITIONS
        if transparent and len(varying) == 1 and varying[0] is not node \
                and self.parts(varying[0]) == self.parts(node):
            return self._terms(varying[0], budget - 1)
        return [node]


_SUMS = ("add", "sub")
_JOINS = frozenset((*_SUMS, "bitwise_and", "logical_and", "__and__", "where", "masked_fill", "mul",
                    "minimum", "maximum", "bitwise_or", "logical_or", "__or__"))


def _joint(node: fx.Node) -> str:
    while node.op == "call_function" and op_name(node) not in _JOINS and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return "+" if node.op == "call_function" and op_name(node) in _SUMS else "&"
