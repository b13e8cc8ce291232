"""Raw scores: the contraction that pairs each query row with each key row.

Four kinds (`Spec.score`): a dot product, a squared distance, an additive form w·tanh(q + k)
(Bahdanau et al. 2015), and none at all, where the logits depend on the key alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from attnopt.passes.normalize import is_tensor, op_name
from attnopt.passes.recognize.axes import Axis, Layout, axes_of, broadcast, fresh, settle, shape_of
from attnopt.passes.recognize.contraction import Contraction, contraction, reduced_dims
from attnopt.passes.recognize.pointwise import is_cast

Operand = tuple[fx.Node, Layout]


@dataclass
class RawScore:
    """score[layout] from two operands; `root` says that the author has its square root (cdist)."""

    kind: str
    node: fx.Node
    left: Operand
    right: Operand
    layout: Layout
    alpha: float = 1.0
    addend: fx.Node | None = None
    beta: float = 1.0
    root: bool = False
    vector: Operand | None = None
    inner: list[fx.Node] = field(default_factory=list)

    @property
    def contracted(self) -> frozenset[Axis]:
        return (axes_of(self.left[1]) & axes_of(self.right[1])) - axes_of(self.layout)


def raw_score(node: fx.Node) -> RawScore | None:
    """Read `node` as raw scores, or None."""
    return _distance(node) or _additive(node) or _dot(node)


def _dot(node: fx.Node) -> RawScore | None:
    found = contraction(node)
    if found is None:
        return None
    return RawScore("dot", node, (found.left, found.left_layout), (found.right, found.right_layout),
                    found.out_layout, found.alpha, found.addend, found.beta,
                    inner=list(found.inner))


def _uncast(node: fx.Node) -> fx.Node:
    while is_cast(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _distance(node: fx.Node) -> RawScore | None:
    name = op_name(node) if node.op == "call_function" else ""
    if name == "cdist":
        return _cdist(node)
    if name != "sum" or not is_tensor(node.args[0]):
        return None
    square: fx.Node = node.args[0]  # type: ignore[assignment]
    squared = op_name(square) == "square" or (
        op_name(square) == "pow" and square.args[1] == 2) or (
        op_name(square) == "mul" and square.args[0] is square.args[1])
    difference = square.args[0] if squared else None
    if difference is None or op_name(difference) != "sub":  # type: ignore[arg-type]
        return None
    assert isinstance(difference, fx.Node)
    left, right = difference.args[:2]
    if not (is_tensor(left) and is_tensor(right)) or difference.kwargs.get("alpha", 1) != 1:
        return None
    return _reduced("distance", node, difference, left, right, [square, difference])  # type: ignore


def _reduced(kind: str, node: fx.Node, pair: fx.Node, left: fx.Node, right: fx.Node,
             inner: list[fx.Node]) -> RawScore | None:
    """A reduction of a broadcast `pair` of tensors over dimensions that both of them have."""
    shape = shape_of(pair.meta["val"])
    dims, keep = reduced_dims(node)
    full = tuple((Axis(s),) for s in shape)
    sides = [broadcast(full, shape_of(x.meta["val"])) for x in (left, right)]
    for side in sides:
        for i in dims:
            at = i - (len(shape) - len(side))
            if at < 0 or (not side[at] and shape[i] != 1):
                return None
    layout = tuple(() if i in dims else a for i, a in enumerate(full) if keep or i not in dims)
    return RawScore(kind, node, (left, sides[0]), (right, sides[1]), layout, inner=inner)


def _cdist(node: fx.Node) -> RawScore | None:
    left, right = node.args[:2]
    p = node.args[2] if len(node.args) > 2 else node.kwargs.get("p", 2.0)
    if p != 2:
        return None
    ls, rs = left.meta["val"].shape, right.meta["val"].shape  # type: ignore[union-attr]
    out = node.meta["val"].shape
    inner, row, column = Axis(ls[-1]), Axis(ls[-2]), Axis(rs[-2])
    batch = fresh(out[:-2])
    return RawScore("distance", node,
                    (left, (*broadcast(batch, ls[:-2]), (row,), (inner,))),  # type: ignore
                    (right, (*broadcast(batch, rs[:-2]), (column,), (inner,))),  # type: ignore
                    (*batch, (row,), (column,)), root=True)


def _additive(node: fx.Node) -> RawScore | None:
    """linear, matmul or multiply-then-sum of tanh(q + k) with a vector."""
    if node.op != "call_function":
        return None
    if op_name(node) == "linear":
        activation, weight = node.args[:2]
        if not is_tensor(activation) or shape_of(weight.meta["val"])[0] != 1:  # type: ignore
            return None
        shape = shape_of(activation.meta["val"])  # type: ignore[union-attr]
        full = tuple((Axis(s),) for s in shape)
        own: Layout = full
        vector: Operand = (weight, ((), full[-1]))  # type: ignore[assignment]
        layout: Layout = (*full[:-1], ())
        addend = node.args[2] if len(node.args) > 2 else None
    else:
        found: Contraction | None = contraction(node)
        if found is None or found.alpha != 1 or found.addend is not None:
            return None
        sides = found.sides()
        flat = [i for i, (_, lay) in enumerate(sides) if axes_of(lay) <= found.contracted]
        if len(flat) != 1:
            return None
        vector, (activation, own) = sides[flat[0]], sides[1 - flat[0]]
        layout, addend = found.out_layout, None
    tanh = _uncast(activation)  # type: ignore[arg-type]
    if tanh.op != "call_function" or op_name(tanh) != "tanh":
        return None
    total = _uncast(tanh.args[0])  # type: ignore[arg-type]
    if op_name(total) != "add" or total.kwargs.get("alpha", 1) != 1:
        return None
    left, right = total.args[:2]
    if not (is_tensor(left) and is_tensor(right)):
        return None
    return RawScore("additive", node,
                    (left, broadcast(own, shape_of(left.meta["val"]))),  # type: ignore
                    (right, broadcast(own, shape_of(right.meta["val"]))),  # type: ignore
                    layout, addend=addend, vector=(vector[0], settle(vector[1])),  # type: ignore
                    inner=[tanh, total])
