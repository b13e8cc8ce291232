"""Where the tokens of an operand come from: back over token-wise operations to the feature map.

A projection, a normalisation over channels, an activation or a scale acts on each token alone; a
view, a permutation or a roll moves tokens. Walking back over both, row q of a window's query is
token (y, x) of the map that the window was cut from. What is neither (the output of another
attention, a convolution, a sum of two branches, a padding) ends the walk: it is the map.
"""

from __future__ import annotations

import torch
from torch import fx

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.passes.analyze.lift import Index, Lifter, Unliftable, bind
from attnopt.passes.analyze.lift_gathers import GATHERS
from attnopt.passes.analyze.lift_views import VIEWS
from attnopt.passes.normalize import is_tensor, op_name

_SCATTERS = {name: GATHERS[name] for name in ("slice_scatter", "select_scatter", "cat", "copy")}
_NORMS = frozenset(("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm"))
_REDUCTIONS = frozenset(("linalg_vector_norm", "norm", "mean", "sum", "amax", "var"))
_CASTS = frozenset(("to", "_to_copy", "type_as"))


class PlaceLifter(Lifter):
    """Lifts a tensor to a load of the map that its tokens come from; channels do not count."""

    def _element(self, node: fx.Node, idx: Index) -> Expr:
        if node.op != "call_function" or node.meta.get("attnopt_opaque"):
            return self.load(node, idx)
        try:
            return self._before(node, idx)
        except LookupError:
            return self.load(node, idx)

    def _before(self, node: fx.Node, idx: Index) -> Expr:
        name, a = op_name(node), bind(node)
        if name in VIEWS:
            return VIEWS[name](self, node, a, idx)
        if name in _SCATTERS:
            return _SCATTERS[name](self, node, a, idx)
        if name in ("constant_pad_nd", "pad") and not any(a.pad):
            return self.element(a.self, idx)
        if name == "linear":
            return self.channels(a.input, idx[:-1])
        if name in _NORMS and len(a.normalized_shape) == 1:
            return self.channels(a.input, idx[:-1])
        if name in _REDUCTIONS and a.get("keepdim") and _last_only(a.get("dim"), len(idx)):
            return self.channels(node.args[0], idx[:-1])  # type: ignore[arg-type]
        if name in ("matmul", "mm") and self.weight(node.args[1]):
            return self.channels(node.args[0], idx[:-1])  # type: ignore[arg-type]
        if name in _CASTS or _pointwise(node):
            return self.same(node, idx)
        raise Unliftable("not token-wise")

    def channels(self, node: fx.Node, token: Index) -> Expr:
        """The token that all channels of `node` belong to, asked of the first and the last."""
        length = node.meta["val"].shape[-1]
        if not isinstance(length, int) or not length:
            raise Unliftable("channels of unknown number")
        first, last = (self.element(node, (*token, E.const(c))) for c in (0, length - 1))
        if not _same_token(first, last):
            raise Unliftable("channels of several tokens")
        return first

    def weight(self, x: object) -> bool:
        """A matrix that is the same for all tokens."""
        while isinstance(x, fx.Node) and x.op == "call_function" and op_name(x) in VIEWS:
            x = x.args[0]
        return isinstance(x, fx.Node) and self.kind_of.get(x.name) in (
            "parameter", "buffer", "constant")

    def same(self, node: fx.Node, idx: Index) -> Expr:
        """The one map that all operands of a pointwise operation come from."""
        found: list[Expr] = []
        for x in node.all_input_nodes:
            if is_tensor(x) and not self.weight(x):
                e = self.operand(x, idx)
                if any(leaf.op == "load" and self.moving(leaf) for leaf in e.leaves):
                    found.append(e)
        if not found or not all(_same_token(found[0], e) for e in found):
            raise Unliftable("several maps")
        return found[0]

    def moving(self, leaf: Expr) -> bool:
        """Is it a tensor of the program's inputs, not of its state and constants?"""
        return self.values.sources(self.nodes[leaf.value]) is None and self.kind_of.get(
            leaf.value) != "parameter"

    def load(self, node: fx.Node, idx: Index) -> Expr:
        self.nodes[node.name] = node
        return E.load(node.name, *idx)


def _same_token(a: Expr, b: Expr) -> bool:
    """Are two elements channels of one token?"""
    return a is b or a.op == b.op == "load" and a.value == b.value and all(
        x is y or x.op == y.op == "const" for x, y in zip(a.args, b.args, strict=True))


def _last_only(dims: object, rank: int) -> bool:
    dims = [dims] if isinstance(dims, int) else dims
    return isinstance(dims, list | tuple) and [d % rank for d in dims] == [rank - 1]


def _pointwise(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
