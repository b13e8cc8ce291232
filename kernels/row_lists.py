"""Attention of some query rows only: the others are 0 and cost nothing.

Rows that a gate or a router leaves out are not computed: the listed rows are gathered, their own
places are read from the list wherever the Spec asks for the index q, and the results are put where
they belong. Any lowering computes the gathered rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.mask import Where
from attnopt.ir.spec import Operand, Spec
from attnopt.kernels.bind import bind

ROWS, LENGTH = "listed_rows", "all_rows"


@functools.lru_cache(maxsize=1024)
def of_listed(spec: Spec) -> Spec:
    """The Spec of gathered rows: its operand `listed_rows` (R,) gives the place of each."""
    place = {E.index("q"): E.load(ROWS, E.index("q"), dtype=E.INT),
             E.size("q"): E.load(LENGTH, 0, dtype=E.INT)}

    def moved(e: Expr | None) -> Expr | None:
        return None if e is None else e.replace(place)

    predicate = spec.mask.predicate()
    mask = spec.mask if predicate.replace(place) is predicate else Where(predicate.replace(place))
    return spec.with_(
        [Operand(ROWS, None, E.INT), Operand(LENGTH, None, E.INT)], mask=mask,
        **{name: moved(getattr(spec, name))
           for name in ("logits", "weights", "output", "groups", "sinks")})


def attend_rows(spec: Spec, schedule: str, rows: Tensor, query: Tensor, key: Tensor, value: Tensor,
                operands: Sequence[Tensor] = ()) -> Tensor:
    """Attention (*L, Q, Dv) of the rows in `rows` (R,) int, each at most once; 0 elsewhere.

    Differentiable. Raises ValueError for a Spec that reads row q of the values.
    """
    if E.value in spec.output.leaves:
        raise ValueError("output must not read the values at row q")
    moved = of_listed(spec)
    given = dict(zip((o.slot for o in spec.operands), operands, strict=True))
    extra = {ROWS: rows, LENGTH: torch.tensor([query.shape[-2]], device=rows.device)}

    def compact(described: Operand) -> Tensor:
        tensor = extra[described.slot] if described.slot in extra else given[described.slot]
        varies = described.axes is not None and "q" in described.axes and tensor.dim() >= 2
        if varies and tensor.shape[-2] != 1:
            return tensor.index_select(-2, rows)
        return tensor

    found = bind(str(moved), schedule)(
        query.index_select(-2, rows), key, value, *map(compact, moved.operands))
    shape = (*found.shape[:-2], query.shape[-2], found.shape[-1])
    return found.new_zeros(shape).index_copy(-2, rows, found)
