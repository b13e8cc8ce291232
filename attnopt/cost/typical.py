"""What the operands of a mask may be like where only the run tells.

A kernel skips the tiles that a document id or a block table hides, but which these are is not known
when its tile is chosen. Predicted times count on nothing: such an operand hides no whole tile. But
among tiles that then look alike, those are better that leave out more once something is hidden. So
tiles are compared with operands of a usual kind: eight documents of equal length, and blocks of
which the nearer half is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.mask import BlockMap
from attnopt.ir.spec import Spec, leading_axes

DOCUMENTS, NEAR = 8, 0.25


def typical_operands(spec: Spec, queries: int, keys: int, leading: Sequence[int],
                     known: Iterable[str] = ()) -> dict[str, Tensor]:
    """Operands of the mask by slot: ids of documents and block tables that are not `known`."""
    found: dict[str, Tensor] = {}
    for node in spec.mask.predicate().walk():
        if node.op == "eq" and all(_is_ids(spec, a) for a in node.args):
            axes = [set(spec.operand(a.value).axes or ()) & {"q", "k"} for a in node.args]
            if sorted(axes, key=min) != [{"k"}, {"q"}]:
                continue
            for load, (axis,) in zip(node.args, axes, strict=True):
                tokens = queries if axis == "q" else keys
                ids = torch.arange(tokens) * DOCUMENTS // max(tokens, 1)
                found[load.value] = ids[:, None] if axis == "q" else ids[None]
    lengths = dict(zip(leading_axes(len(leading)), leading, strict=True))
    for mask in spec.mask.walk():
        if isinstance(mask, BlockMap):
            rows, columns = -(-queries // mask.block_q), -(-keys // mask.block_k)
            gap = torch.arange(rows)[:, None] / rows - torch.arange(columns) / columns
            lead = [lengths.get(axis, 1) for axis in mask.leading]
            found[mask.slot] = (gap.abs() <= NEAR).expand(*lead, rows, columns)
    return {slot: tensor for slot, tensor in found.items() if slot not in set(known)}


def _is_ids(spec: Spec, node: Expr) -> bool:
    return node.op == "load" and not node.args and node.dtype == E.INT and (
        spec.operand(node.value).axes is not None)
