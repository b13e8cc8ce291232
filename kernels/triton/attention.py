"""The Triton lowering of a Spec: the call, its gradient, and what is left to ATen.

Under autograd the kernel computes what comes before the output epilogue, which ATen applies then:
its operands have their gradients from there. The backward of the backward is that of the ATen
composition, as kernels have none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnopt import logs
from attnopt.errors import KernelError
from attnopt.ir import expr as E
from attnopt.ir.evaluate import Env, evaluate
from attnopt.ir.spec import Schedule, Spec
from attnopt.kernels import aten
from attnopt.kernels.aten.state import call_state
from attnopt.kernels.triton import backward, ready
from attnopt.kernels.triton.declines import interpreted, of_spec
from attnopt.kernels.triton.gradients import INPUTS, Gradients
from attnopt.kernels.triton.launch import default_tile, run_forward
from attnopt.kernels.triton.problem import describe
from attnopt.kernels.triton.tiles import Tile, widest

LOWERING = "triton"
#: layouts of calls that are remembered
_MOST_KNOWN = 256


class Attention:
    """A Spec as Triton kernels: `attention(query, key, value, operands)` -> out or None.

    query (*L, Q, D), key (*L, K, D), value (*L, K, Dv), which broadcast, give a contiguous
    (*L, Q, Dv). None means that this call is not for the kernels (another dtype or device, an empty
    length, a gradient they do not have): the caller then computes it otherwise.

    tile: rows, keys, warps and stages; None for the default of the device
    gradient_tile: likewise for the backward kernels
    """

    def __init__(self, spec: Spec, tile: Tile | None = None,
                 gradient_tile: Tile | None = None) -> None:
        self.spec, self.tile, self.gradient_tile = spec, tile, gradient_tile
        self.taken = not of_spec(spec)
        self.known: dict[tuple[Any, ...], ready.Ready] = {}
        self.core = spec if spec.output is E.out else spec.with_(output=E.out)
        self.learns = not backward.reasons(spec)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor,
                 operands: Sequence[Tensor] = ()) -> Tensor | None:
        if not self.taken or query.device.type != "cuda" and not interpreted():
            return None
        state = call_state((query, key, value, *operands))
        try:
            if state == "all":
                return self.inference((query, key, value, *operands))
            if state == "safe" and self.learns:
                return self.training(query, key, value, operands)
        except KernelError as error:
            # Another triton, or a device with less room than is known: the composition serves.
            self.taken = False
            logs.get("triton").warning("a generated kernel is not used: %s", error)
        return None

    def inference(self, tensors: tuple[Tensor, ...]) -> Tensor | None:
        """Without a graph; what was found out about a call serves the next one of its kind."""
        layout = ready.key(tensors)
        known = self.known.get(layout)
        if known is not None and known.possible():
            return known(*tensors)
        query, key, value, *operands = tensors
        problem = describe(self.spec, query, key, value, operands)
        if isinstance(problem, str):
            return None
        tile = self.tile or default_tile(self.spec, problem)
        if known is not None or any(
                problem.tensors[n] is not t for n, t in zip(INPUTS, tensors, strict=False)):
            return run_forward(self.spec, problem, tile)[0]  # in a graph, or of copies
        if len(self.known) >= _MOST_KNOWN:
            self.known.clear()
        self.known[layout] = made = ready.Ready(self.spec, problem, tile)
        return made(*tensors)

    def training(self, query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor]
                 ) -> Tensor | None:
        """With a graph for the gradient."""
        named = dict(zip((o.slot for o in self.spec.operands), operands, strict=True))
        asked = frozenset(slot for slot, t in named.items() if t.requires_grad)
        kinds = backward.kinds(self.spec, asked, ())
        if kinds is None or "table" in kinds.values() and (
                torch.are_deterministic_algorithms_enabled()):  # sums by atomics have no order
            return None
        if self.gradient_tile is None and max(query.shape[-1], value.shape[-1]) > widest(
                query.element_size(), gradient=True):
            return None
        inner = [named[o.slot] for o in self.core.operands]
        if isinstance(describe(self.core, query, key, value, inner), str):
            return None
        out: Tensor = _Function.apply(self, query, key, value, *inner)
        if self.core is self.spec:
            return out
        env = Env(tuple(out.shape), named, {E.out: out, E.value: value}, {"k": key.shape[-2]},
                  last=("q", "d"), dtype=out.dtype, device=out.device)
        finished = torch.as_tensor(evaluate(self.spec.output, env), device=out.device)
        return finished.expand(out.shape).to(out.dtype).contiguous()


class _Function(torch.autograd.Function):
    """The core of an Attention: forward and backward kernels."""

    @staticmethod
    def forward(ctx: Any, attention: Attention, query: Tensor, key: Tensor, value: Tensor,
                *operands: Tensor) -> Tensor:
        problem = describe(attention.core, query, key, value, operands, lse=True)
        if isinstance(problem, str):
            raise ValueError(f"the call must be one for the kernels: {problem}")
        tile = attention.tile or default_tile(attention.core, problem)
        out, lse = run_forward(attention.core, problem, tile)
        ctx.attention = attention
        ctx.save_for_backward(query, key, value, *operands, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        *inputs, out, lse = ctx.saved_tensors
        attention: Attention = ctx.attention
        needed = ctx.needs_input_grad[1:]
        names = (*INPUTS, *(o.slot for o in attention.core.operands))
        if torch.is_grad_enabled():
            return None, *_composed(attention.core, inputs, grads[0], needed)
        problem = describe(attention.core, inputs[0], inputs[1], inputs[2], inputs[3:], lse=True)
        assert not isinstance(problem, str)
        wanted = [n for n, need in zip(names, needed, strict=True) if need]
        try:
            found = Gradients(
                attention.core, problem, out, lse, grads[0], [n for n in wanted if n in INPUTS],
                [n for n in wanted if n not in INPUTS], attention.gradient_tile).run()
        except KernelError as error:
            attention.learns = False
            logs.get("triton").warning("a generated gradient is not used: %s", error)
            composed = _composed(attention.core, inputs, grads[0], needed)
            return None, *(g if g is None else g.detach() for g in composed)
        return None, *(found.get(n) if need else None
                       for n, need in zip(names, needed, strict=True))


def _composed(spec: Spec, inputs: Sequence[Tensor], grad: Tensor, needed: Sequence[bool]
              ) -> list[Tensor | None]:
    """The gradient by ATen, with a graph of its own."""
    with torch.enable_grad():
        # The same tensors, so that the result is connected to them, under names of this graph.
        views = [t.view_as(t) for t in inputs]
        out = aten.bind(str(spec), str(Schedule("aten:dense")))(*views)
        chosen = [v for v, need in zip(views, needed, strict=True) if need]
        found = iter(torch.autograd.grad(out, chosen, grad, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needed]


@functools.lru_cache(maxsize=4096)
def bind(spec: str, schedule: str = "") -> Callable[..., Tensor]:
    """The function (query, key, value, *operands) -> out of a Spec's and a Schedule's text form.

    A Schedule is ["triton", rows, keys, warps, stages]; any other means the default tile. Calls
    that the kernels do not take are computed by ATen. Raises ValueError for text that is no Spec
    and, when called, for another number of operands than the Spec has.
    """
    parsed = Spec.parse(spec)
    asked = Schedule.parse(schedule) if schedule else Schedule(LOWERING)
    own = asked.lowering == LOWERING and len(asked.tile) == 4
    attention = Attention(parsed, Tile(*asked.tile) if own else None)
    otherwise = aten.bind(spec)

    def run(query: Tensor, key: Tensor, value: Tensor, *operands: Tensor) -> Tensor:
        device = query.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            # As torch's own fused attention: inputs in the dtype of autocast, then as they are.
            dtype = torch.get_autocast_dtype(device)
            cast = [t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t
                    for t in (query, key, value)]
            with torch.autocast(device, enabled=False):
                return run(*cast, *operands)
        if len(operands) == len(parsed.operands):
            out = attention(query, key, value, operands)
            if out is not None:
                return out
        return otherwise(query, key, value, *operands)

    return run
