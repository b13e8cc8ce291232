"""The log-sum-exp as a second output, and attention over parts of the keys merged by it.

Attention over all keys is the mean of attentions over parts of them, weighted by what each part's
softmax divides by (Milakov & Gimelshein, arXiv 1805.02867; as used for split keys and for groups of
keys): out = sum_i exp(lse_i - lse) out_i with lse = log sum_i exp(lse_i).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.spec import Schedule, Spec
from attnopt.kernels import cpp
from attnopt.kernels.aten.state import call_state
from attnopt.kernels.bind import bind
from attnopt.kernels.cpp.template import WINDOW


@functools.lru_cache(maxsize=1024)
def bind_with_lse(spec: str, schedule: str = "") -> Callable[..., tuple[Tensor, Tensor]]:
    """(query, key, value, *operands) -> out (*L, Q, Dv) and lse (*L, Q), float32 or float64.

    lse is the log of what the normaliser divides by, sinks included; -inf where a row has no key.
    It has a gradient where out has one.
    """
    parsed = Spec.parse(spec)
    plain = parsed.with_(lse=False)
    attention = bind(str(plain), schedule)
    lse_of = plain.with_(output=E.stat("lse"))
    slots = [o.slot for o in plain.operands]
    kept = [slots.index(o.slot) for o in lse_of.operands]
    asked = Schedule.parse(schedule) if schedule else Schedule("")
    kernel = cpp.Attention(plain, asked.tile, lowering=asked.lowering) \
        if asked.lowering in ("cpp", WINDOW) else None

    def run(query: Tensor, key: Tensor, value: Tensor, *operands: Tensor
            ) -> tuple[Tensor, Tensor]:
        if kernel is not None and call_state((query, key, value, *operands)) == "all":
            both = kernel.with_lse(query, key, value, operands)
            if both is not None:
                return both
        wide = [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
                for t in (query, key, value[..., :1])]
        lse = bind(str(lse_of))(*wide, *(operands[i] for i in kept))
        return attention(query, key, value, *operands), lse[..., 0]

    return run


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over several sets of keys as one: outs (*L, Q, Dv) and lses (*L, Q) of each.

    A set without a key (lse of -inf) has no part in it, whatever its out; a row without any is NaN.
    """
    if len(outs) != len(lses) or not outs:
        raise ValueError(f"outs and lses must be as many, got {len(outs)} and {len(lses)}")
    stacked = torch.stack(list(lses))
    weights = torch.softmax(stacked, 0).unsqueeze(-1)
    parts = [torch.where(w > 0, w * o.to(w.dtype), 0.0 * w) for w, o in zip(
        weights, outs, strict=True)]
    total = functools.reduce(torch.add, parts)
    return total.to(outs[0].dtype), torch.logsumexp(stacked, 0)
