"""Spec -> ATen: works on every device, differentiates, exports. `bind` is what runs.

Three lowerings share the steps of the normal form: `sdpa` (fused), `blocks` (row blocks; for
gradients they are composed again, one by one) and `dense` (one composition). Which one a call gets
follows from the Spec, the Schedule and the call itself: shapes, device, and whether a gradient may
be asked for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.spec import Schedule, Spec
from attnopt.kernels.aten.blocks import blocks
from attnopt.kernels.aten.choose import block_tile, can_block, choose
from attnopt.kernels.aten.dense import dense
from attnopt.kernels.aten.rows import attend_by_rows, block_rows
from attnopt.kernels.aten.sdpa import plan, quick, sdpa
from attnopt.kernels.aten.skipping import skips_keys
from attnopt.kernels.aten.state import call_state
from attnopt.kernels.aten.steps import steps
from attnopt.kernels.aten.tile import broadcast

__all__ = ["bind", "choose"]

Attention = Callable[..., Tensor]


@functools.lru_cache(maxsize=4096)
def bind(spec: str, schedule: str = "") -> Attention:
    """The function (query, key, value, *operands) -> out of a Spec's and a Schedule's text form.

    A Schedule that is empty, or of a lowering that is not here or does not compute the Spec, is
    chosen again at each call. Raises ValueError for text that is not a Spec, and, when called,
    for another number of operands than the Spec has.
    """
    return _Bound(Spec.parse(spec), Schedule.parse(schedule) if schedule else None)


class _Bound:
    """A Spec ready to run."""

    __slots__ = ("spec", "steps", "plan", "quick", "slots", "tile", "may_block",
                 "by_dtype", "skipping")

    def __init__(self, spec: Spec, schedule: Schedule | None) -> None:
        asked = schedule.lowering if schedule else ""
        self.spec = spec
        self.steps = steps(spec)
        self.plan = None if asked in ("aten:blocks", "aten:dense") else plan(spec)
        self.quick = self.plan is not None and self.plan.bare and spec.output is E.out
        self.slots = tuple(o.slot for o in spec.operands)
        self.tile = schedule.tile if schedule and asked == "aten:blocks" else ()
        self.skipping = skips_keys(spec)
        self.by_dtype: dict[torch.dtype, bool] = {}
        self.may_block = asked != "aten:dense"

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *operands: Tensor) -> Tensor:
        if len(operands) != len(self.slots):
            raise ValueError(f"operands must be {len(self.slots)}, got {len(operands)}")
        device = query.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            return self.autocast(device, query, key, value, operands)
        state = call_state((query, key, value, *operands))
        p = self.plan
        if self.quick and state == "all":
            assert p is not None
            out = quick(p, query, key, value)
            if out is not None:
                return out
        if p is not None and state != "functional" and p.fits(
                query.shape[-1], value.shape[-1], device):
            return sdpa(self.steps, p, query, key, value, operands, state,
                        lambda: self.compose(query, key, value, operands, state))
        return self.compose(query, key, value, operands, state)

    def compose(self, query: Tensor, key: Tensor, value: Tensor, operands: tuple[Tensor, ...],
                state: str) -> Tensor:
        """Anything but fused attention."""
        named = dict(zip(self.slots, operands, strict=True))
        if state == "all" and self.may_block and self.blocks_take(query.dtype):
            leads = broadcast(query.shape[:-2], key.shape[:-2], value.shape[:-2])
            if self.fit(leads, operands):
                tile = self.tile
                if len(tile) != 2:
                    tile = block_tile(self.spec.score, math.prod(leads), query.shape[-2],
                                      key.shape[-2], query.shape[-1], query.device.type,
                                      self.skipping)
                if tile:
                    return blocks(self.steps, query, key, value, named, *tile)
        rows = block_rows(self.spec, query, key, value, self.tile) if state == "safe" else 0
        if rows and self.may_block:
            return attend_by_rows(self.steps, query, key, value, named, rows, lambda: self.compose(
                query, key, value, operands, "all"))
        return dense(self.steps, query, key, value, named,
                     state if state in ("safe", "all") else "none")

    def blocks_take(self, dtype: torch.dtype) -> bool:
        if dtype not in self.by_dtype:
            self.by_dtype[dtype] = can_block(self.spec, dtype)
        return self.by_dtype[dtype]

    def fit(self, leads: tuple[int, ...], operands: Sequence[Tensor]) -> bool:
        """Whether no operand has leading axes that query, key and value have not got."""
        for described, tensor in zip(self.spec.operands, operands, strict=True):
            if described.axes is None or tensor.dim() <= 2:
                continue
            own = tensor.shape[:-2]
            if len(own) > len(leads) or any(
                    own[-i] not in (1, leads[-i]) for i in range(1, len(own) + 1)):
                return False
        return True

    def autocast(self, device: str, query: Tensor, key: Tensor, value: Tensor,
                 operands: tuple[Tensor, ...]) -> Tensor:
        """As torch's own fused attention: inputs in the dtype of autocast, and then as they are."""
        dtype = torch.get_autocast_dtype(device)
        q, k, v = (t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t
                   for t in (query, key, value))
        with torch.autocast(device, enabled=False):
            return self(q, k, v, *operands)

