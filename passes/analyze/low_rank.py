"""Low-rank terms of a computed operand: which may be a second dot product of the scores.

A factorisation that the author's own graph holds (a product of two matrices, see
`lift_contractions`) is taken as it is, where the term is added to the scores: the kernel then gets
it as further columns of query and key (`attnopt.kernels.low_rank`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.spec import Spec
from attnopt.kernels import low_rank
from attnopt.passes.analyze.inline_operands import Operands
from attnopt.passes.analyze.lift import Unliftable

#: columns beyond which the products cost more than any load
MOST = 256


def without(e: Expr) -> Expr:
    """An expression without its low-rank terms: what a kernel computes at each score."""
    return e.replace({leaf: E.const(0.0) for leaf in e.leaves if leaf.op == "inner"})


def admit(operands: Operands, spec: Spec, changes: Mapping[str, Any]) -> int:
    """The columns of the low-rank terms of `spec` with `changes`. Raises Unliftable where a term is
    not added to the scores, nor multiplies them."""
    logits = changes.get("logits", spec.logits)
    if not any(e.has("inner") for e in changes.values() if isinstance(e, Expr)):
        return 0
    known = {o.slot for o in spec.operands}
    more = [o for o in operands.described if o.slot not in known]
    if low_rank.widening(spec.with_(more, logits=logits)) is None:
        raise Unliftable("a product that is not added to the scores")
    rank = operands.rank(logits)
    if rank > MOST:
        raise Unliftable(f"a product over {rank} columns, more than a load costs")
    return rank
