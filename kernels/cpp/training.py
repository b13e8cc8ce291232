"""Generated C++ under autograd: the forward keeps what its backward kernel needs.

Saved are the inputs, the operands, the output and two numbers per row (see `Kernel.__call__`). When
the graph of the gradient is asked for, or the gradient comes from functorch, the attention is
composed from ATen once more, which differentiates at any order.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnopt.errors import AttnOptError
from attnopt.ir import expr as E
from attnopt.ir.derivative import derivative
from attnopt.ir.spec import Spec
from attnopt.kernels import aten
from attnopt.kernels.aten.state import call_state
from attnopt.kernels.aten.tile import broadcast
from attnopt.kernels.cpp.attention import Attention, warn_once
from attnopt.kernels.cpp.call import Kernel, kernel, signature_of
from attnopt.kernels.cpp.call_backward import Backward, backward
from attnopt.kernels.cpp.integers import LARGEST
from attnopt.kernels.cpp.isa import Isa, isa
from attnopt.kernels.cpp.template import Parts, Tile
from attnopt.kernels.cpp.template_backward import loads_of

#: keys of a tile; from so many keys on, the first
_WIDTHS, _FEW = (64, 48), 512
_GRADIENTS = {torch.float32, torch.bfloat16, torch.float16}
#: keys, and rows, up to which all of them are one tile; beyond, tiles leave the caches
MOST_FEW = 112
#: of `is_grads_batched`, which functorch does not know of
_is_batched = torch._C._functorch.is_legacy_batchedtensor


@functools.lru_cache(maxsize=1024)
def training_reasons(spec: Spec, wanted: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Why no backward kernel is generated for the Spec; empty where one is.

    wanted: slots of operands whose gradient is asked for. What keeps the Spec from generated C++
    altogether (`spec_reasons`) is not repeated.
    """
    found = []
    if spec.score != "dot":
        found.append(f"gradients need scores that are dot products, got {spec.score}")
    if spec.normalizer != "softmax":
        found.append(f"gradients need a softmax, got {spec.normalizer}")
    if spec.sinks is not None:
        found.append("gradients do not pass through sinks")
    if spec.weights is not E.weight or spec.renormalize:
        found.append("gradients do not pass through an epilogue of the weights")
    if spec.output is not E.out:
        found.append("gradients do not pass through an epilogue of the output")
    if spec.empty_row == "uniform" and not spec.mask.row_always_kept():
        found.append("gradients need rows without a key to be nan or zero")
    if found:
        return tuple(found)
    scaled = Parts.of(spec).scaled
    try:
        derivative(scaled, E.score)
    except ValueError as error:
        found.append(f"the logits have no derivative: {error}")
    for slot in wanted:
        described = spec.operand(slot)
        if described.dtype != E.FLOAT:
            found.append(f"operand {slot!r} must be floating to have a gradient")
            continue
        try:
            loads_of(spec, slot)
        except ValueError as error:
            found.append(f"the logits have no derivative in {slot!r}: {error}")
    return tuple(found)


def backward_tile(spec: Spec, keys: int | None = None, target: Isa | None = None) -> Tile:
    """The tile of the backward kernel: many rows, because each row tile reads and writes the
    gradients of all keys; fewer where a mask leaves tiles out. Few keys are cut so that little of
    the last tile is empty."""
    rows = 96 if spec.mask.predicate() is E.TRUE else 48
    width = _WIDTHS[0]
    if keys is not None and keys < _FEW:
        width = min(_WIDTHS, key=lambda n: -keys % n)
    return Tile(rows, width, 6, 4 if (target or isa()).registers >= 32 else 2)


def few_keys_tile(query: Sequence[int], key: Sequence[int], value: Sequence[int],
                  target: Isa | None = None) -> Tile | None:
    """The tile of the backward kernel for few keys at these shapes, None where it does not serve
    them: more than that, or keys that several heads share."""
    leads = broadcast(query[:-2], key[:-2], value[:-2])
    rows, keys = query[-2], key[-2]
    if max(rows, keys) > MOST_FEW or not leads == tuple(key[:-2]) == tuple(value[:-2]):
        return None
    isa_ = target or isa()
    vectors = -(-keys // isa_.width)
    each = max(n for n in (1, 2, 3, 4) if vectors % n == 0)
    most = min((isa_.registers - 1 - each) // each, 14)
    block = min(range(max(1, most // 2), most + 1),
                key=lambda n: (-(-rows // n) * n + -(-keys // n) * n, -n))
    return Tile(-(-rows // block) * block, vectors * isa_.width, block, each, whole=True)


class Training:
    """A Spec as generated C++ where autograd records: (query, key, value, operands) -> out or None.

    None means that these tensors are not for the kernels: the caller then computes them otherwise.
    """

    def __init__(self, attention: Attention) -> None:
        self.attention, self.spec = attention, attention.spec
        self.pairs: dict[Any, tuple[Kernel, Backward] | None] = {}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor]
                 ) -> Tensor | None:
        attention = self.attention
        if not attention.possible or not attention.takes(query, key, value, operands):
            return None
        if any(t.numel() > LARGEST for t in operands):  # expanded: its gradient is not
            return None
        tile = attention.given(query, key) or attention.chosen(query, key, value, operands)
        if tile is None:
            return None
        back = few_keys_tile(query.shape, key.shape, value.shape, attention.target) \
            or backward_tile(self.spec, key.shape[-2], attention.target)
        rank = max(query.dim(), key.dim(), value.dim())
        known = (tile, back, query.dtype, query.shape[-1], value.shape[-1], rank,
                 *((t.dtype, t.dim(), t.requires_grad) for t in operands))
        if known not in self.pairs:
            self.pairs[known] = self.pair(tile.aligned, back, query, key, value, operands)
        pair = self.pairs[known]
        if pair is None:
            return None
        out: Tensor = _Attend.apply(attention, *pair, query, key, value, *operands)
        return out

    def pair(self, tile: Tile, back: Tile, query: Tensor, key: Tensor, value: Tensor,
             operands: Sequence[Tensor]) -> tuple[Kernel, Backward] | None:
        """The kernels of output and gradients; None where there are none."""
        target = self.attention.target
        learned = {o.slot: t.dtype for o, t in zip(self.spec.operands, operands, strict=True)
                   if t.requires_grad}
        wanted = tuple(learned)
        if training_reasons(self.spec, wanted) or not set(learned.values()) <= _GRADIENTS:
            return None
        signature = signature_of(self.spec, query, key, value, operands)
        try:
            return kernel(signature, tile, target), backward(signature, wanted, back, target)
        except AttnOptError as error:
            warn_once(str(error))
            return None


class _Attend(torch.autograd.Function):
    """The two kernels as one differentiable function."""

    @staticmethod
    def forward(ctx: Any, attention: Attention, forward: Kernel, gradients: Backward,
                query: Tensor, key: Tensor, value: Tensor, *operands: Tensor) -> Tensor:
        leads = broadcast(query.shape[:-2], key.shape[:-2], value.shape[:-2])
        statistics = torch.empty((*leads, query.shape[-2], 2), dtype=torch.float32, device="cpu")
        out = forward(query, key, value, operands, statistics=statistics,
                      lists=attention.lists(query, key, value, operands, forward.tile))
        if out._is_view():  # autograd lets nobody write to a view that a function returns
            out = out.new_empty(0).set_(out)  # type: ignore[call-overload]
        # A product of matrices does not save its result, so that whoever gets it may write to it:
        # this one is saved under a counter of its own, and computed again after a write.
        ctx.save_for_backward(query, key, value, out.data, statistics, *operands)
        ctx.writes, ctx.forward = out.detach(), forward
        ctx.writes.data = out.new_empty(0)  # of the output, the counter of writes alone
        ctx.before = out._version
        ctx.attention, ctx.gradients = attention, gradients
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, out, statistics, *operands = ctx.saved_tensors
        attention, gradients = ctx.attention, ctx.gradients
        inputs, needed = (query, key, value), ctx.needs_input_grad[3:]
        grad = grads[0]
        plain = call_state((grad, *inputs, *operands)) == "all" and not _is_batched(grad)
        if not plain:
            found = _composed(attention.spec, (*inputs, *operands), grad, needed)
        else:
            if ctx.writes._version != ctx.before:
                tiles = attention.lists(query, key, value, operands, ctx.forward.tile)
                out = ctx.forward(query, key, value, operands, lists=tiles)
            lists = attention.lists(query, key, value, operands, gradients.tile)
            found = gradients(inputs, operands, out, statistics, grad, needed[:3], lists=lists)
        return (None, None, None, *found)


def _composed(spec: Spec, tensors: Sequence[Tensor], grad: Tensor, needed: Sequence[bool]
              ) -> list[Tensor | None]:
    """The gradients from ATen, with a graph of their own where grad mode is on."""
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # The same tensors, so that the result is connected to them, under names of this graph.
        views = [t.view_as(t) if want else t for t, want in zip(tensors, needed, strict=True)]
        out = aten.bind(str(spec))(*views)
        chosen = [v for v, want in zip(views, needed, strict=True) if want]
        found = iter(torch.autograd.grad(out, chosen, grad, create_graph=graph,
                                         allow_unused=True))
    return [next(found) if want else None for want in needed]
