"""Spec + Schedule -> the function that a call runs.

The ATen lowerings compute every Spec on every device. Generated kernels stand in front of them: one
that is not for a call (another dtype, an empty length, a gradient it has none for) hands it on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attnopt.ir.spec import Schedule, Spec
from attnopt.kernels import aten, cpp, gated_rows, kept_keys, living_keys, low_rank, triton
from attnopt.kernels.aten.state import call_state
from attnopt.kernels.cpp import stencil
from attnopt.kernels.cpp.template import WINDOW

Attention = Callable[..., Tensor]


@functools.lru_cache(maxsize=4096)
def bind(spec: str, schedule: str = "") -> Attention:
    """The function (query, key, value, *operands) -> out of a Spec's and a Schedule's text form.

    A Schedule that is empty, or of a lowering that is not here or does not compute the Spec, is
    chosen again at each call. Raises ValueError for text that is not a Spec, and, when called,
    for another number of operands than the Spec has.
    """
    asked = Schedule.parse(schedule) if schedule else Schedule("")
    made = _bind(spec, schedule, asked)
    gated = gated_rows.gates_of(Spec.parse(spec))
    return gated_rows.Gated(Spec.parse(spec), asked, made, bind) if gated else made


def _bind(spec: str, schedule: str, asked: Schedule) -> Attention:
    wide = low_rank.widening(Spec.parse(spec))
    if wide is not None and asked.lowering in ("cpp", "aten:sdpa"):
        return low_rank.Wide(Spec.parse(spec), wide, bind(str(wide.spec), schedule),
                             aten.bind(spec))
    if asked.lowering in ("cpp", WINDOW) and not cpp.spec_reasons(Spec.parse(spec)):
        made = _Generated(Spec.parse(spec), asked)
        slots = living_keys.slots_of(Spec.parse(spec))
        if slots is not None:
            return living_keys.Living(Spec.parse(spec), slots, schedule, made, bind)
        if kept_keys.kept_of(Spec.parse(spec)) is not None:
            return kept_keys.Keeping(Spec.parse(spec), ("", ""), schedule, made, bind)
        return made
    if asked.lowering == stencil.LOWERING and not stencil.spec_reasons(Spec.parse(spec)):
        return _Stencil(Spec.parse(spec), asked)
    if asked.lowering == triton.LOWERING:
        return triton.bind(spec, schedule)
    return aten.bind(spec, schedule)


class _Generated:
    """A Spec whose calls go to a generated kernel, or else to ATen."""

    __slots__ = ("slots", "kernel", "training", "aten")

    def __init__(self, spec: Spec, schedule: Schedule) -> None:
        self.slots = len(spec.operands)
        attention = cpp.Attention(spec, schedule.tile, lowering=schedule.lowering)
        self.kernel: Callable[..., Tensor | None] = attention
        self.training = cpp.Training(attention)
        self.aten = aten.bind(str(spec))

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *operands: Tensor) -> Tensor:
        if len(operands) == self.slots and not torch.is_autocast_enabled("cpu"):
            state = call_state((query, key, value, *operands))
            out = None
            if state == "all":
                out = self.kernel(query, key, value, operands)
            elif state == "safe":
                out = self.training(query, key, value, operands)
            if out is not None:
                return out
        return self.aten(query, key, value, *operands)


class _Stencil(_Generated):
    """Likewise by a stencil; gradients, and calls that it does not take, by the tiled kernel."""

    __slots__ = ("stencil", "tiled")

    def __init__(self, spec: Spec, schedule: Schedule) -> None:
        super().__init__(spec, Schedule("cpp"))
        self.stencil, self.tiled = stencil.Stencil(spec, schedule.tile), self.kernel
        self.kernel = self.first_of_both

    def first_of_both(self, query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor]
                      ) -> Tensor | None:
        out = self.stencil(query, key, value, operands)
        return self.tiled(query, key, value, operands) if out is None else out
