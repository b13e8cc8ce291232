"""Attention of some query rows only: the others are 0 and cost nothing.

Rows that a gate or a router leaves out are not computed: the listed rows are gathered, their own
places are read from the list wherever the Spec asks for the index q, and the results are put where
they belong. Any lowering computes the gathered rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.spec import Operand, Spec
from attnopt.kernels.bind import bind
from attnopt.kernels.gated_rows import LENGTH, ROWS, of_listed


def attend_rows(spec: Spec, schedule: str, rows: Tensor, query: Tensor, key: Tensor, value: Tensor,
                operands: Sequence[Tensor] = ()) -> Tensor:
    """Attention (*L, Q, Dv) of the rows in `rows` (R,) int, each at most once; 0 elsewhere.

    Differentiable. Raises ValueError for a Spec that reads row q of the values.
    """
    if E.value in spec.output.leaves:
        raise ValueError("output must not read the values at row q")
    moved = of_listed(spec)
    given = dict(zip((o.slot for o in spec.operands), operands, strict=True))
    extra = {ROWS: rows[:, None], LENGTH: torch.tensor([query.shape[-2]], device=rows.device)}

    def compact(described: Operand) -> Tensor:
        if described.slot in extra:
            return extra[described.slot]
        tensor = given[described.slot]
        varies = described.axes is not None and "q" in described.axes and tensor.dim() >= 2
        if varies and tensor.shape[-2] != 1:
            return tensor.index_select(-2, rows)
        return tensor

    found = bind(str(moved), schedule)(
        query.index_select(-2, rows), key, value, *map(compact, moved.operands))
    shape = (*found.shape[:-2], query.shape[-2], found.shape[-1])
    return found.new_zeros(shape).index_copy(-2, rows, found)
