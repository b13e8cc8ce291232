"""Training in blocks of query rows: nothing of queries x keys is kept for the backward pass.

The forward pass is inference, and keeps its inputs alone. The backward pass goes over blocks of
rows: it composes a block of the output once more, with a graph, and takes its gradient, so that one
block of scores is alive at a time (rematerialisation; Chen et al., arXiv 1604.06174, by rows as in
Rabe and Staats, arXiv 2112.05682). It costs one more product of queries and keys.

A gradient of the gradient composes everything once, as `dense` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.mask import ALL
from attnopt.ir.spec import Spec
from attnopt.kernels.aten.dense import composed, dense, working_dtype
from attnopt.kernels.aten.skipping import key_range, skips_keys
from attnopt.kernels.aten.steps import Steps
from attnopt.kernels.aten.tile import Tile, broadcast

#: bytes of scores from which on rows are taken block by block, and of the scores of a block
LEAST_BYTES, BLOCK_BYTES = 1 << 24, 1 << 22
MOST_ROWS, LEAST_ROWS = 256, 8


def block_rows(spec: Spec, query: Tensor, key: Tensor, value: Tensor, tile: Sequence[int] = ()
               ) -> int:
    """Query rows of a block of the backward pass, those of `tile` where one was asked for; 0 where
    all are better taken at once."""
    if spec.dropout:  # a draw that is not repeated
        return 0
    if tile:
        return tile[0]
    heads = math.prod(broadcast(query.shape[:-2], key.shape[:-2], value.shape[:-2]))
    width = 4 * heads * key.shape[-2] * (query.shape[-1] if spec.score == "additive" else 1)
    if not width or width * query.shape[-2] < LEAST_BYTES or not value.shape[-1]:
        return 0
    return max(LEAST_ROWS, min(MOST_ROWS, BLOCK_BYTES // width))


def attend_by_rows(s: Steps, query: Tensor, key: Tensor, value: Tensor,
                   operands: Mapping[str, Tensor], rows: int, forward: Callable[[], Tensor]
                   ) -> Tensor:
    """`dense`, with a gradient by blocks of `rows`; `forward` computes it without one."""
    out: Tensor = _Rows.apply(_Pass(s, tuple(operands), rows, forward), query, key, value,
                              *operands.values())
    return out


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Pass, *tensors: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(*tensors)
        out = run.forward()
        run.forward = None  # it holds the inputs
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        run, tensors, wanted = ctx.run, ctx.saved_tensors, ctx.needs_input_grad[1:]
        again = torch.is_grad_enabled()
        return (None, *(run.again if again else run.by_rows)(tensors, wanted, grads[0]))


class _Pass:
    def __init__(self, s: Steps, slots: tuple[str, ...], rows: int,
                 forward: Callable[[], Tensor]) -> None:
        self.s, self.slots, self.rows = s, slots, rows
        self.forward: Any = forward
        spec = s.spec
        exprs = [e for e in (spec.logits, spec.weights, spec.output, spec.sinks, spec.groups,
                             s.predicate) if e is not None]
        leaves = {leaf for e in exprs for leaf in e.leaves}
        whole = {slot for leaf in leaves if leaf.op == "inner" for slot in leaf.value}
        whole |= {leaf.value for leaf in leaves if leaf.op == "load" and leaf.args}
        #: operands of which a block needs its own rows and keys alone
        self.cut = frozenset(o.slot for o in spec.operands
                             if o.axes is not None and o.slot not in whole)

    def again(self, tensors: Sequence[Tensor], wanted: Sequence[bool], grad: Tensor
              ) -> list[Tensor | None]:
        """The gradients, with a graph of their own."""
        with torch.enable_grad():
            # The same tensors, so that the result is connected to them, under names of this graph.
            query, key, value, *others = views = [t.view_as(t) for t in tensors]
            out = dense(self.s, query, key, value, dict(zip(self.slots, others, strict=True)),
                        "none")
            chosen = [v for v, w in zip(views, wanted, strict=True) if w]
            found = iter(torch.autograd.grad(out, chosen, grad, create_graph=True,
                                             allow_unused=True))
        return [next(found) if w else None for w in wanted]

    def by_rows(self, tensors: Sequence[Tensor], wanted: Sequence[bool], grad: Tensor
                ) -> list[Tensor | None]:
        """The gradients, one block of rows after the other."""
        spec = self.s.spec
        query, key, value = tensors[:3]
        dtype = working_dtype(query)
        queries, keys = query.shape[-2], key.shape[-2]
        own_values = E.value in spec.output.leaves
        mask = self.s.spec.mask if skips_keys(spec) and not own_values else ALL
        totals = [torch.zeros_like(t, dtype=dtype if i < 3 else t.dtype) if w else None
                  for i, (t, w) in enumerate(zip(tensors, wanted, strict=True))]
        for row in range(0, queries, self.rows):
            count = min(self.rows, queries - row)
            first, stop = key_range(mask, row, row + count, queries, keys)
            spans = {"q": (row, count), "k": (first, stop - first)}
            parts = [self.part(i, t, spans) for i, t in enumerate(tensors)]
            leaves = [p.detach().to(dtype) if i < 3 else p.detach() for i, p in enumerate(parts)]
            for leaf, w in zip(leaves, wanted, strict=True):
                leaf.requires_grad_(w)
            with torch.enable_grad():
                out = self.block(leaves, spans, (queries, keys))
            ahead = grad.narrow(-2, row, count).to(out.dtype)
            chosen = [leaf for leaf, w in zip(leaves, wanted, strict=True) if w]
            found = iter(torch.autograd.grad(out, chosen, ahead, allow_unused=True))
            for i, total in enumerate(totals):
                one = next(found) if total is not None else None
                if one is not None:
                    self.part(i, total, spans).add_(one)  # type: ignore[arg-type]
        return [None if total is None else total.to(t.dtype)
                for total, t in zip(totals, tensors, strict=True)]

    def part(self, place: int, tensor: Tensor, spans: Mapping[str, tuple[int, int]]) -> Tensor:
        """What a block needs of a tensor, as a view."""
        if place == 0:
            return tensor.narrow(-2, *spans["q"])
        if place in (1, 2):
            return tensor.narrow(-2, *spans["k"])
        if self.slots[place - 3] in self.cut:
            for axis, name in ((-2, "q"), (-1, "k")):
                if tensor.dim() >= -axis and tensor.shape[axis] != 1:
                    tensor = tensor.narrow(axis, *spans[name])
        return tensor

    def block(self, leaves: Sequence[Tensor], spans: Mapping[str, tuple[int, int]],
              total: tuple[int, int]) -> Tensor:
        """A block of the output, differentiable."""
        query, key, value, *others = leaves
        operands = dict(zip(self.slots, others, strict=True))
        (row, count), (first, keys) = spans["q"], spans["k"]
        leads = broadcast(query.shape[:-2], key.shape[:-2], *(
            () if self.s.spec.mix_logits or self.s.spec.mix_weights else (value.shape[:-2],)))
        starts = (*(0 for _ in leads), row, first)
        tile = _Cut(self.cut, (*leads, count, keys), operands, query.dtype, query.device,
                    (*leads, *total), starts)

        def end(shape: tuple[int, ...]) -> Tile:
            full = (*shape[:-2], total[0], shape[-1])
            return _Cut(self.cut, shape, operands, query.dtype, query.device, full,
                        (*(0 for _ in shape[:-2]), row, 0), ("q", "d"), {"k": total[1]})
        own = value.narrow(-2, row, count) if E.value in self.s.spec.output.leaves else value
        return composed(self.s, query, key, value, tile, end, "safe", own)


class _Cut(Tile):
    """A window whose operands of rows and keys are those of the window already."""

    __slots__ = ("cut",)

    def __init__(self, cut: frozenset[str], *args: Any) -> None:
        super().__init__(*args)
        self.cut = cut

    def broadcast(self, slot: str) -> Tensor:
        return self.operand(slot) if slot in self.cut else super().broadcast(slot)
