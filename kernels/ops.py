"""The op `attnopt::attention` and `attend`, what eager graphs call in its place.

    attention(Tensor query, Tensor key, Tensor value, Tensor[] operands, str spec,
              str schedule="") -> (Tensor out, Tensor lse)

The op is composite: torch.export keeps it whole and `torch.export.save` stores it, while autograd
of any order, functorch and autocast see through it to ATen. It names what to compute by the text of
a Spec and how by the text of a Schedule; an empty or foreign schedule is chosen again at run time.
`lse` is the log-sum-exp of every row where the Spec asks for it, otherwise an empty tensor.

The dispatcher costs some 15 us a call, so a graph that runs eagerly calls `attend` instead. It is
an importable function of the texts, fit for torch.fx code and pickles.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from attnopt.ir.spec import Spec
from attnopt.kernels.bind import bind
from attnopt.kernels.merging import bind_with_lse

__all__ = ["attend", "attention", "bind"]

_library = torch.library.Library("attnopt", "FRAGMENT")
_library.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor[] operands, str spec, "
    "str schedule='') -> (Tensor out, Tensor lse)", tags=(torch.Tag.pt2_compliant_tag,))


def _attention(query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor], spec: str,
               schedule: str = "") -> tuple[Tensor, Tensor]:
    if Spec.parse(spec).lse:
        return bind_with_lse(spec, schedule)(query, key, value, *operands)
    out = bind(spec, schedule)(query, key, value, *operands)
    return out, out.new_empty(0)


_library.impl("attention", _attention, "CompositeImplicitAutograd")
# Under vmap the composition is batched, not the op.
_library.impl("attention", _attention, "FuncTorchBatchedDecomposition")

attention = torch.ops.attnopt.attention.default


def attend(spec: str, schedule: str, query: Tensor, key: Tensor, value: Tensor,
           *operands: Tensor) -> Tensor:
    """The attention of a Spec's text: query (*L, Q, D), key (*L, K, D), value (*L, K, Dv) and the
    operands in the order of the Spec give (*L, Q, Dv) in the dtype of query.

    Fused attention gives the strides that torch gives it, other lowerings a contiguous tensor.
    Raises ValueError for text that is no Spec and for a wrong number of operands.
    """
    if isinstance(query, fx.Proxy):  # torch.fx rebuilds a pickled graph by tracing its code
        traced: Tensor = query.tracer.create_proxy(
            "call_function", attend, (spec, schedule, query, key, value, *operands), {})
        return traced
    if torch.compiler.is_compiling():
        out: Tensor = attention(query, key, value, list(operands), spec, schedule)[0]
        return out
    return bind(spec, schedule)(query, key, value, *operands)
