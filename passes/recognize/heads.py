"""Head mixing: a small matrix applied along the heads of scores or weights (talking heads,
Shazeer et al. 2020), spelled as a linear layer on permuted scores, a 1x1 convolution or an einsum.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from attnopt.passes.normalize import is_tensor, op_name
from attnopt.passes.recognize.axes import length, shape_of
from attnopt.passes.recognize.contraction import contraction

MOST_HEADS = 256


@dataclass(frozen=True)
class HeadMix:
    """result[..., g, ...] = sum over h of matrix[g, h] * source[..., h, ...] along `dim`.

    transposed: the matrix is stored as (h, g).
    """

    source: fx.Node
    dim: int
    matrix: fx.Node
    bias: fx.Node | None = None
    transposed: bool = False


def head_mix(node: fx.Node) -> HeadMix | None:
    """Read `node` as a mixing along one axis of a tensor of rank 3 or more, or None."""
    if node.op != "call_function" or not is_tensor(node):
        return None
    name = op_name(node)
    found = _linear(node) if name == "linear" else _conv(node) if name.startswith("conv") \
        else _einsum(node) if name == "einsum" else None
    if found is None or node.meta["val"].dim() < 3:
        return None
    heads = shape_of(found.matrix.meta["val"])[:2]
    square = heads[0] == heads[1] and isinstance(heads[0], int) and 1 < heads[0] <= MOST_HEADS
    return found if square else None


def _linear(node: fx.Node) -> HeadMix | None:
    source, weight, *bias = node.args
    if not is_tensor(source) or not is_tensor(weight):
        return None
    rank = len(shape_of(source.meta["val"]))  # type: ignore[union-attr]
    return HeadMix(source, rank - 1, weight, bias[0] if bias else None)  # type: ignore[arg-type]


def _conv(node: fx.Node) -> HeadMix | None:
    source, weight, *rest = node.args
    shape = shape_of(weight.meta["val"])  # type: ignore[union-attr]
    if any(s != 1 for s in shape[2:]) or any(length(a) != length(b) for a, b in zip(
            shape_of(source.meta["val"])[2:], shape_of(node.meta["val"])[2:],  # type: ignore
            strict=True)):
        return None
    groups = rest[4] if len(rest) > 4 else node.kwargs.get("groups", 1)
    if groups != 1 or len(shape_of(node.meta["val"])) != len(shape):
        return None
    return HeadMix(source, 1, weight, rest[0] if rest else None)  # type: ignore[arg-type]


def _einsum(node: fx.Node) -> HeadMix | None:
    found = contraction(node)
    if found is None or len(found.contracted) != 1:
        return None
    (axis,) = found.contracted
    pairs = ((found.left, found.left_layout, found.right, found.right_layout),
             (found.right, found.right_layout, found.left, found.left_layout))
    for matrix, matrix_layout, source, layout in pairs:
        if len(matrix_layout) != 2 or len(layout) < 3 or (axis,) not in layout:
            continue
        dim = layout.index((axis,))
        mine = matrix_layout.index((axis,))
        expected = (*layout[:dim], matrix_layout[1 - mine], *layout[dim + 1:])
        if expected == found.out_layout:
            return HeadMix(source, dim, matrix, None, transposed=mine == 0)
    return None
