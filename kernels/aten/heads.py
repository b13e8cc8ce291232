"""Any number of leading axes as the (batch, heads) that fused attention takes, mostly by views."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from attnopt.kernels.aten.tile import broadcast


def collapse(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
             ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, bool]:
    """4-D query, key, value and mask, and whether several query heads share a key head.

    query (*L, Q, D), key (*L, K, D), value (*L, K, Dv) and mask (*L, Q, K) broadcast along L and
    come back as (B, H, …) with B * H entries for those of L in order. The mask keeps length 1
    where it is the same for a whole of B or H.
    """
    if query.dim() == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2] and (
            mask is None or mask.dim() == 2 or mask.dim() == 4):
        return query, key, value, mask, False
    leads = broadcast(*(t.shape[:-2] for t in (query, key, value, mask)
                                     if t is not None))
    count = len(leads)
    if count < 2:
        leads, count = (1,) * (2 - count) + tuple(leads), 2
    query, key, value = (_padded(t, count) for t in (query, key, value))
    mask = mask if mask is None or mask.dim() == 2 else _padded(mask, count)
    shared = count > 2 and key.shape[-3] == value.shape[-3] == 1 and leads[-1] != 1
    at = count - 2 if shared else _split(leads, mask)
    query = _merged(query, leads, at)
    if shared:
        key, value = (_merged(t.squeeze(-3), leads[:-1], at) for t in (key, value))
    else:
        key, value = (_merged(t, leads, at) for t in (key, value))
    if mask is not None and mask.dim() > 2:
        own = [*_whole(mask.shape[:at], leads[:at]), *_whole(mask.shape[at:-2], leads[at:])]
        mask = _merged(mask, own, at)
    return query, key, value, mask, shared


def _padded(tensor: Tensor, count: int) -> Tensor:
    """At least `count` leading axes."""
    return tensor[(None,) * (count + 2 - tensor.dim())]


def _merged(tensor: Tensor, leads: Sequence[int], at: int) -> Tensor:
    """(prod(leads[:at]), prod(leads[at:]), rows, columns)."""
    rows, columns = tensor.shape[-2:]
    if tuple(tensor.shape[:-2]) != tuple(leads):
        tensor = tensor.expand(*leads, rows, columns)
    if len(leads) == 2:
        return tensor
    return tensor.reshape(math.prod(leads[:at]), math.prod(leads[at:]), rows, columns)


def _whole(own: Sequence[int], leads: Sequence[int]) -> Sequence[int]:
    """The axes of a group that a mask must be written out along: none or all."""
    return own if all(n == 1 for n in own) else leads


def _split(leads: Sequence[int], mask: Tensor | None) -> int:
    """Where to part the leading axes so that the mask is written out least; rather late."""
    last = len(leads) - 1
    if mask is None or mask.dim() == 2 or last == 1:
        return last
    if not all(isinstance(n, int) for n in (*leads, *mask.shape)):
        return last

    def copies(at: int) -> int:
        own = mask.shape[:-2]
        return math.prod(_whole(own[:at], leads[:at])) * math.prod(_whole(own[at:], leads[at:]))

    return min(range(last, 0, -1), key=copies)
