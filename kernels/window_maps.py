"""Attention within windows of a map, which reads and writes the map itself.

    window_attention(Tensor query, Tensor key, Tensor value, Tensor[] operands, str spec,
                     str schedule, str places) -> Tensor

query and key (S, H, T, D) and value (S, H, T, Dv) are the T tokens of S maps; `places` are whole
numbers (windows, rows) as `attnopt.kernels.tabulate` writes them: row i of window w of a map is its
token places[w, i], each token once. With n windows the Spec is computed over (S * n, H, rows, D),
and the result is (S, H, T, Dv), every row back at its token. A roll, a partition, its reverse and
the roll back are no operations then. The op is a composition; the C++ kernel for few keys follows
`places` itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from attnopt.ir.spec import Schedule, Spec
from attnopt.kernels.aten.state import call_state
from attnopt.kernels.bind import bind
from attnopt.kernels.cpp.attention import Attention
from attnopt.kernels.cpp.call import Places
from attnopt.kernels.cpp.template import WINDOW
from attnopt.kernels.tabulate import literal_text, numbers_of

_library = torch.library.Library("attnopt", "FRAGMENT")
_library.define(
    "window_attention(Tensor query, Tensor key, Tensor value, Tensor[] operands, str spec, "
    "str schedule, str places) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


class Windowed:
    """A Spec over windows of maps: (query, key, value, *operands) -> out, all of maps."""

    def __init__(self, spec: str, schedule: str, places: str) -> None:
        self.inside = bind(spec, schedule)
        self.places = numbers_of(places)
        windows, rows = self.places.shape
        self.flat = self.places.flatten().long()
        if not torch.equal(self.flat.sort().values, torch.arange(windows * rows)):
            raise ValueError("places must hold each token once, got "
                             f"{len(self.flat.unique())} of {windows * rows}")
        self.back = torch.argsort(self.flat)
        self.places_of_kernel = Places(self.places, windows * rows, 0)
        asked = Schedule.parse(schedule)
        self.kernel: Attention | None = None
        if asked.lowering == WINDOW:
            self.kernel = Attention(Spec.parse(spec), asked.tile, lowering=WINDOW)

    @functools.cached_property
    def literals(self) -> tuple[str, str]:
        """`flat` and `back` as texts: a traced program holds no tensor of ours."""
        with _disable_current_modes():
            return literal_text(self.flat), literal_text(self.back)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *operands: Tensor) -> Tensor:
        state = call_state((query, key, value, *operands))
        if self.kernel is not None and not torch.is_autocast_enabled("cpu") and state == "all":
            found = self.kernel.in_maps(query, key, value, operands, self.places_of_kernel)
            if found is not None:
                return found
        if state == "traced":
            flat, back = (torch.ops.attnopt.literal.default([query], [], t)
                          for t in self.literals)
        else:
            flat, back = self.flat.to(query.device), self.back.to(query.device)
        windows, rows = self.places.shape
        inside = [t.index_select(-2, flat).unflatten(-2, (windows, rows)).movedim(-3, 1)
                  .flatten(0, 1) for t in (query, key, value)]
        out = self.inside(*inside, *operands).unflatten(0, (-1, windows))
        return out.movedim(1, -3).flatten(-3, -2).index_select(-2, back)


@functools.lru_cache(maxsize=1024)
def bind_windows(spec: str, schedule: str, places: str) -> Callable[..., Tensor]:
    """The function (query, key, value, *operands) -> out of the texts."""
    with _disable_current_modes(), torch.inference_mode(False):  # no fake tensor is kept
        return Windowed(spec, schedule, places)


def _window_attention(query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor],
                      spec: str, schedule: str, places: str) -> Tensor:
    return bind_windows(spec, schedule, places)(query, key, value, *operands)


_library.impl("window_attention", _window_attention, "CompositeImplicitAutograd")
_library.impl("window_attention", _window_attention, "FuncTorchBatchedDecomposition")

window_attention = torch.ops.attnopt.window_attention.default


def attend_windows(spec: str, schedule: str, places: str, query: Tensor, key: Tensor,
                   value: Tensor, *operands: Tensor) -> Tensor:
    """What eager graphs call in place of the op."""
    if isinstance(query, fx.Proxy):  # torch.fx rebuilds a pickled graph by tracing its code
        traced: Tensor = query.tracer.create_proxy("call_function", attend_windows, (
            spec, schedule, places, query, key, value, *operands), {})
        return traced
    if torch.compiler.is_compiling():
        out: Tensor = window_attention(query, key, value, list(operands), spec, schedule, places)
        return out
    return bind_windows(spec, schedule, places)(query, key, value, *operands)
