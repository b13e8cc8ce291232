"""What an attention gives in float64, one head and some rows at a time, and how far off others are.

At the lengths that are measured the scores of all heads would not fit into memory in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.bench.attentions import Attention

_ROWS = 512


@dataclass(frozen=True)
class Truth:
    """The output of some (batch, head), each (Q, Dv) in float64, and the gradients if asked for."""

    places: tuple[tuple[int, int], ...]
    tensors: tuple[tuple[Tensor, ...], ...]

    def error(self, found: Sequence[Tensor]) -> float:
        """Largest absolute difference of (output,) or (output, dq, dk, dv), each (B, H, N, D)."""
        worst = 0.0
        for (b, h), exact in zip(self.places, self.tensors, strict=True):
            for mine, other in zip(exact, found, strict=True):
                away = (mine - other[b, h].double()).abs().max().item()
                worst = max(worst, math.inf if math.isnan(away) else away)
        return worst


def truth(attention: Attention, query: Tensor, key: Tensor, value: Tensor,
          gradient: Tensor | None = None, heads: int = 4) -> Truth:
    """`heads` heads of the first and the last batch entry.

    gradient: of the output (B, H, Q, Dv); the gradients of query, key and value are then there too,
    for which key must have the heads of query.
    """
    count = query.shape[1]
    places = tuple((b, h) for b in sorted({0, query.shape[0] - 1})
                   for h in range(0, count, max(1, count // heads)))
    group = count // key.shape[1]
    found = []
    for b, h in places:
        q, k, v = (x.detach()[b, i].double().requires_grad_(gradient is not None)
                   for x, i in ((query, h), (key, h // group), (value, h // group)))
        out = []
        for start in range(0, len(q), _ROWS):
            rows = slice(start, start + _ROWS)
            part = _block(attention, b, h, q, k, v, rows)
            if gradient is not None:
                part.backward(gradient[b, h, rows].double())
            out.append(part.detach())
        grads = () if gradient is None else tuple(x.grad for x in (q, k, v) if x.grad is not None)
        found.append((torch.cat(out), *grads))
    return Truth(places, tuple(found))


def visible(attention: Attention, queries: int, keys: int, device: torch.device,
            batch: int = 1) -> int:
    """How many (row, key) pairs of one head are computed, in all batch entries."""
    known = attention.pairs(queries, keys)
    if known is not None or not attention.has_keep:
        return batch * (queries * keys if known is None else known)
    total = 0
    k = torch.arange(keys, device=device)
    for b in range(batch if attention.by_batch else 1):
        for start in range(0, queries, _ROWS):
            q = torch.arange(start, min(start + _ROWS, queries), device=device)[:, None]
            total += int(attention.keep(b, 0, q, k).expand(len(q), keys).sum())
    return total if attention.by_batch else batch * total


def _block(attention: Attention, b: int, h: int, query: Tensor, key: Tensor, value: Tensor,
           rows: slice) -> Tensor:
    q = torch.arange(len(query), device=query.device)[rows, None]
    k = torch.arange(len(key), device=query.device)
    scores = query[rows] @ key.T / math.sqrt(query.shape[-1])
    head = torch.tensor(h, dtype=torch.float64, device=query.device)
    scores = attention.score(scores, b, head, q, k)
    if attention.has_keep:
        scores = scores.masked_fill(~attention.keep(b, h, q, k), -math.inf)
    return torch.softmax(scores, -1) @ value
