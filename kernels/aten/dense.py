"""The dense lowering: one composition of ATen ops that computes any Spec.

It is differentiable as often as one likes, exports, vmaps and traces with symbolic sizes, on any
device. Against what an author writes it saves copies: heads that share keys become rows of one
product, steps whose result autograd does not need work in place, and half precision, for which a
CPU has no fast elementwise code, is computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.kernels.aten.scores import contract, raw_scores
from attnopt.kernels.aten.steps import Steps, finish, weigh
from attnopt.kernels.aten.tile import Tile, broadcast

HALF = (torch.float16, torch.bfloat16)


def working_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which scores and weights are computed."""
    upcast = tensor.dtype in HALF and tensor.device.type in ("cpu", "meta")
    return torch.float32 if upcast else tensor.dtype


def dense(s: Steps, query: Tensor, key: Tensor, value: Tensor, operands: Mapping[str, Tensor],
          mode: str) -> Tensor:
    """Attention of (*L, Q, D), (*L, K, D), (*L, K, Dv): a contiguous (*L, Q, Dv), dtype of query.

    mode: "none", "safe" or "all", see `attnopt.kernels.aten.codegen`.
    """
    spec, dtype = s.spec, working_dtype(query)
    q, k, v = (query, key, value) if query.dtype == dtype else (
        query.to(dtype), key.to(dtype), value.to(dtype))
    if spec.mix_logits or spec.mix_weights:  # mixing may change the number of heads
        leads = broadcast(q.shape[:-2], k.shape[:-2])
    else:
        leads = broadcast(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    tile = Tile((*leads, q.shape[-2], k.shape[-2]), operands, dtype, q.device)

    def end(shape: tuple[int, ...]) -> Tile:
        return Tile(shape, operands, dtype, q.device, last=("q", "d"), sizes={"k": k.shape[-2]})
    out = composed(s, q, k, v, tile, end, mode)
    if mode == "all" and s.recheck and out.numel() and q.device.type != "meta" and (
            math.isnan(out.select(-1, 0).sum().item())):
        return dense(s, query, key, value, operands, "none")
    return out.to(query.dtype).contiguous()


def composed(s: Steps, query: Tensor, key: Tensor, value: Tensor, tile: Tile,
             end: Callable[[tuple[int, ...]], Tile], mode: str, own: Tensor | None = None
             ) -> Tensor:
    """The window `tile` of the output, in the working dtype of its inputs, which are those of the
    window; `end` makes the window of the output from its shape, `own` are the values of its rows.
    """
    scores = raw_scores(s.spec, query, key, tile)
    if s.alpha != 1:
        scores = scores * s.alpha if mode == "none" else scores.mul_(s.alpha)
    weight = weigh(s, tile, scores, mode, scaled=True)
    out = contract(weight.to(value.dtype), value)
    whole = (*broadcast(tile.shape[:-2], out.shape[:-2]), query.shape[-2], value.shape[-1])
    if tuple(out.shape) != whole:
        out, mode = out.expand(whole), "none"
    if s.spec.output is not E.out:
        last = end(whole)
        last.leaves.update(tile.leaves)
        out = finish(s, out, value if own is None else own, last, mode)
    return out
