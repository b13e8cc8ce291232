"""The blocks lowering: inference in blocks of query rows; the scores are never held whole.

Every block has one buffer that stays in the cache: the GEMM writes the scores into it, everything
up to the weights works in place, and the second GEMM reads it. A block is a few rows of a few
heads (`attnopt.kernels.aten.choose.block_tile`). Causal and banded masks skip the keys that no row
of the block keeps. Heads that share keys become rows of one GEMM.

The fast steps may give NaN where the exact ones do not (a hidden key with a NaN score, a row
without a key): a block whose output has NaN is computed again exactly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.mask import ALL
from attnopt.kernels.aten.dense import dense, working_dtype
from attnopt.kernels.aten.scores import additive_scores, augmented, contract, raw_scores
from attnopt.kernels.aten.skipping import key_range, skips_keys
from attnopt.kernels.aten.steps import Steps, finish, weigh
from attnopt.kernels.aten.tile import Tile, broadcast


def blocks(s: Steps, query: Tensor, key: Tensor, value: Tensor, operands: Mapping[str, Tensor],
           rows: int, group: int) -> Tensor:
    """Attention as `dense` computes it, without autograd: a contiguous (*L, Q, Dv).

    rows: query rows of a block; group: how many entries of the leading axes go into one.
    """
    leads = broadcast(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    total = (*leads, query.shape[-2], key.shape[-2])
    if 0 in total or 0 in (query.shape[-1], value.shape[-1]):
        return dense(s, query, key, value, operands, "all")
    return _Blocks(s, query, key, value, operands, total).run(rows, group)


class _Blocks:
    def __init__(self, s: Steps, query: Tensor, key: Tensor, value: Tensor,
                 operands: Mapping[str, Tensor], total: tuple[int, ...]) -> None:
        self.s, self.operands, self.total = s, operands, total
        self.dtype = working_dtype(query)
        self.rank = len(total) - 2
        self.query = self.plain_query = _with_leads(query, self.rank)
        self.key, self.value = (
            _packed(_with_leads(t, self.rank).to(self.dtype)) for t in (key, value))
        # Heads that share keys and values are rows of one product.
        self.shared = self.rank > 0 and total[-3] > 1 and (
            self.key.shape[-3] == self.value.shape[-3] == 1)
        self.rows_of_keys = self.key
        if s.spec.score == "distance":
            self.query, self.rows_of_keys = augmented(self.query, self.key)
        self.out = torch.empty(
            *total[:-1], value.shape[-1], dtype=query.dtype, device=query.device)

    def run(self, rows: int, group: int) -> Tensor:
        queries, keys = self.total[-2:]
        mask = self.s.spec.mask if skips_keys(self.s.spec) else ALL
        self.buffer = torch.empty(
            rows * group * keys, dtype=self.dtype, device=self.out.device)
        for start, lengths in _chunks(self.total[:-2], group):
            chunk = _Chunk(self, start, lengths)
            for row in range(0, queries, rows):
                count = min(rows, queries - row)
                first, stop = key_range(mask, row, row + count, queries, keys)
                self.block(chunk, (*start, row, first), (*lengths, count, stop - first))
        return self.out

    def block(self, chunk: _Chunk, starts: tuple[int, ...], shape: tuple[int, ...]) -> None:
        """Compute the window of the output that belongs to this window of the scores."""
        s, (row, first), (rows, keys) = self.s, starts[-2:], shape[-2:]
        batch, height = chunk.batch, chunk.heads * rows
        k, v = chunk.key, chunk.value
        if keys != self.total[-1]:
            k, v = k.narrow(1, first, keys), v.narrow(1, first, keys)
        q, out = chunk.query, chunk.out
        if rows != self.total[-2]:
            q, out = q.narrow(-2, row, rows), out.narrow(-2, row, rows)
        flat = (batch, height, keys)
        scores, scaled = self.scores(q, k, flat, starts, shape)
        tile = Tile(shape, self.operands, self.dtype, out.device, self.total, starts)
        weight = weigh(s, tile, scores.view(shape), "all", scaled)
        if weight.shape != shape:
            weight = weight.expand(shape)
        if weight.dtype != self.dtype:  # an operand of a wider dtype
            weight = weight.to(self.dtype)
        result = torch.bmm(weight.reshape(flat), v).view(*shape[:-1], -1)
        if s.recheck and math.isnan(result.select(-1, 0).sum().item()):
            result = self.exact(tile, starts, shape)
        out.copy_(result if s.spec.output is E.out else self.finished(result, tile, starts))

    def scores(self, q: Tensor, k: Tensor, flat: tuple[int, int, int], starts: tuple[int, ...],
               shape: tuple[int, ...]) -> tuple[Tensor, bool]:
        """Raw scores of a window in the buffer, and whether they are already times alpha."""
        s = self.s
        buffer = self.buffer[: math.prod(flat)].view(flat)
        if s.spec.score == "key":
            return buffer.zero_(), False
        if s.spec.score == "additive":
            weight = self.operands["score_weight"]
            if weight.dim() > 1:
                weight = self.window(
                    _with_leads(weight.unsqueeze(-2), self.rank), starts, shape).squeeze(-2)
            k = self.window(self.key, starts, shape, keys=True)
            scores = additive_scores(q.to(self.dtype), k, weight, "all")
            return buffer.view(shape).copy_(scores), False
        q = q.reshape(flat[0], flat[1], -1)
        if k.dtype != self.dtype:  # squared distances, in double precision
            return buffer.copy_(torch.bmm(q, k.mT)).clamp_(min=0.0), False
        return torch.baddbmm(
            buffer, q.to(self.dtype), k.mT, beta=0, alpha=s.alpha, out=buffer), True

    def exact(self, tile: Tile, starts: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """A window of the output without any of the fast steps."""
        q = self.window(self.plain_query, starts, shape, rows=True).to(self.dtype)
        k, v = (self.window(t, starts, shape, keys=True) for t in (self.key, self.value))
        scores = raw_scores(self.s.spec, q, k, tile).expand(shape)
        weight = weigh(self.s, tile, scores, "none")
        return contract(weight, v).expand(*shape[:-1], v.shape[-1])

    def finished(self, out: Tensor, tile: Tile, starts: tuple[int, ...]) -> Tensor:
        """A window of the output after its epilogue."""
        spec, rows = self.s.spec, out.shape[-2]
        if spec.output is E.out:
            return out
        value = self.value
        if E.value in spec.output.leaves:
            window = (*out.shape[:-2], rows, rows)
            value = self.window(value, (*starts[:-1], starts[-2]), window, keys=True)
        end = Tile(tuple(out.shape), self.operands, self.dtype, out.device,
                   (*self.total[:-1], out.shape[-1]), (*starts[:-1], 0), ("q", "d"),
                   {"k": self.total[-1]})
        end.leaves.update(tile.leaves)
        return finish(self.s, out, value, end, "all")

    def window(self, tensor: Tensor, starts: tuple[int, ...], shape: tuple[int, ...],
               rows: bool = False, keys: bool = False) -> Tensor:
        """The part of a tensor (*L, N, …) that a window of the scores needs."""
        for axis in range(self.rank):
            if tensor.shape[axis] != 1 and shape[axis] != self.total[axis]:
                tensor = tensor.narrow(axis, starts[axis], shape[axis])
        if rows:
            return tensor.narrow(-2, starts[-2], shape[-2])
        return tensor.narrow(-2, starts[-1], shape[-1]) if keys else tensor


class _Chunk:
    """What the blocks of some entries of the leading axes have in common.

    query: (*chunk, Q, D); key, value: (batch, K, …), once for all heads that share them; out:
    (*chunk, Q, Dv), the part of the output.
    """

    def __init__(self, whole: _Blocks, start: tuple[int, ...], lengths: tuple[int, ...]) -> None:
        self.heads = lengths[-1] if whole.shared else 1
        self.batch = math.prod(lengths) // self.heads
        self.query = whole.window(whole.query, start, lengths)
        if self.query.shape[:-2] != lengths:
            self.query = self.query.expand(*lengths, *self.query.shape[-2:])
        leads = lengths[:-1] if whole.shared else lengths
        self.key, self.value = (
            self.flat(whole.window(t, start, lengths), leads, whole.shared)
            for t in (whole.rows_of_keys, whole.value))
        self.out = whole.out
        for axis, (first, length) in enumerate(zip(start, lengths, strict=True)):
            if length != whole.total[axis]:
                self.out = self.out.narrow(axis, first, length)

    def flat(self, tensor: Tensor, leads: tuple[int, ...], shared: bool) -> Tensor:
        tensor = tensor.squeeze(-3) if shared else tensor
        return tensor.expand(*leads, *tensor.shape[-2:]).reshape(self.batch, *tensor.shape[-2:])


def _with_leads(tensor: Tensor, rank: int) -> Tensor:
    """At least `rank` leading axes, and repetitions by expand undone."""
    for axis in range(tensor.dim() - 2):
        if tensor.stride(axis) == 0 and tensor.shape[axis] > 1:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor[(None,) * (rank + 2 - tensor.dim())]


def _packed(tensor: Tensor) -> Tensor:
    """The leading axes as one in memory, so that the GEMM of a window needs no copy."""
    return tensor.reshape(-1, *tensor.shape[-2:]).view(tensor.shape)


def _chunks(leads: tuple[int, ...], group: int
            ) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(starts, lengths) of windows of at most `group` entries that cover the leading axes."""
    steps = []
    for length in reversed(leads):
        steps.append(max(1, min(length, group)))
        group //= steps[-1]
    steps.reverse()
    for starts in itertools.product(
            *(range(0, n, step) for n, step in zip(leads, steps, strict=True))):
        yield starts, tuple(
            min(step, n - a) for n, step, a in zip(leads, steps, starts, strict=True))
