"""Attentions of which most scores are hidden, each spelled as a model's author does.

    BlockPattern   frames of a video, nearer ones seen more widely; the mask is a buffer
    Packed         documents one after the other in a row of tokens; their ids are an input
    Padded         sentences of different lengths in one batch; the attention mask is an input
    Grid           windows around each token of an image or a video, pushed inward at its edges;
                   the mask is a buffer or made from coordinates at each call
    DynamicMask    each row keeps the keys of largest bias, a function of the values (Doge:
                   arXiv 2508.02124), by a top-k of every row

See `attnopt.bench.attentions` for what the methods mean.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnopt.bench.attentions import Attention, _Masked


class BlockPattern(_Masked):
    """A static mask in blocks: the further apart two frames are, the nearer their places must be;
    the first frame is seen by all (the shape of Radial Attention, arXiv 2506.19852)."""

    mask: Tensor

    def __init__(self, frames: int, tokens: int, block: int = 64) -> None:
        super().__init__()
        self.block = block
        place = torch.arange(frames * tokens // block) * block
        frame, inside = place // tokens, place % tokens
        apart = (frame[:, None] - frame).abs()
        width = tokens / 2.0 ** torch.floor(torch.log2(apart.clamp(min=1))) / 5
        near = (inside[:, None] - inside).abs() < width.clamp(min=block)
        self.kept = (apart <= 1) | near | (frame == 0)
        self.register_buffer("mask", self.kept.repeat_interleave(block, 0)
                             .repeat_interleave(block, 1))

    def change(self, scores: Tensor) -> Tensor:
        return scores.masked_fill(~self.mask, float("-inf"))

    def fused(self, query: Tensor, key: Tensor) -> dict[str, Any] | None:
        return {"attn_mask": self.mask}

    def keep(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        return self.kept[q // self.block, k // self.block]


class Packed(_Masked):
    """Documents of the given lengths share a row of tokens and do not see each other."""

    def __init__(self, lengths: Sequence[int], causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))

    def extras(self) -> tuple[Tensor, ...]:
        return (self.ids[None],)

    def forward(self, query: Tensor, key: Tensor, value: Tensor,  # type: ignore[override]
                ids: Tensor) -> Tensor:
        mask = (ids[:, :, None] == ids[:, None, :])[:, None]
        if self.causal:
            rows = torch.arange(ids.shape[1], device=ids.device)
            mask = mask & (rows[:, None] >= rows)
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return torch.softmax(scores, dim=-1) @ value

    def keep(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        same = self.ids[q] == self.ids[k]
        return same & (q >= k) if self.causal else same


class Padded(_Masked):
    """A batch of sentences; 0 in the attention mask (B, N) hides a key."""

    by_batch = True

    def __init__(self, lengths: Sequence[int]) -> None:
        super().__init__()
        self.lengths = torch.tensor(lengths)
        self.present = (torch.arange(max(lengths)) < self.lengths[:, None]).long()

    def extras(self) -> tuple[Tensor, ...]:
        return (self.present,)

    def forward(self, query: Tensor, key: Tensor, value: Tensor,  # type: ignore[override]
                attention_mask: Tensor) -> Tensor:
        added = (1.0 - attention_mask[:, None, None, :].to(query.dtype)) * (
            torch.finfo(query.dtype).min)
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + added
        return torch.softmax(scores, dim=-1) @ value

    def fused(self, query: Tensor, key: Tensor) -> dict[str, Any] | None:
        return {"attn_mask": self.present.bool()[:, None, None, :]}

    def keep(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k < self.lengths[b]) & (q >= 0)


class Grid(_Masked):
    """Windows on a row-major grid of any dimensions. made: "buffer", or "computed" in forward."""

    mask: Tensor

    def __init__(self, length: Sequence[int], window: Sequence[int], made: str = "buffer") -> None:
        super().__init__()
        self.length, self.window, self.made = tuple(length), tuple(window), made
        if made == "buffer":
            count = math.prod(length)
            self.register_buffer("mask", self._grid(count, count, torch.device("cpu")))

    def change(self, scores: Tensor) -> Tensor:
        mask = self.mask if self.made == "buffer" else self._coordinates(scores.device)
        return scores.masked_fill(~mask, float("-inf"))

    def _coordinates(self, device: torch.device) -> Tensor:
        token = torch.arange(math.prod(self.length), device=device)
        mask, inside = None, math.prod(self.length)
        for length, window in zip(self.length, self.window, strict=True):
            inside //= length
            place = token // inside % length
            start = (place - window // 2).clamp(0, length - window)[:, None]
            near = (place >= start) & (place < start + window)
            mask = near if mask is None else mask & near
        assert mask is not None
        return mask

    def others(self) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
        return {"unfold": self.unfolded} if len(self.length) == 2 and self.window[0] < 16 else {}

    def unfolded(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Every token's own copy of its window, the spelling that needs no mask."""
        (height, width), (down, across) = self.length, self.window
        rows = (torch.arange(height) - down // 2).clamp(0, height - down)
        columns = (torch.arange(width) - across // 2).clamp(0, width - across)

        def windows(x: Tensor) -> Tensor:  # (B, H, N, D) to (B, H, N, keys of a window, D)
            image = x.unflatten(2, (height, width))
            cut = image.unfold(2, down, 1).unfold(3, across, 1)
            mine = cut[:, :, rows[:, None], columns]
            return mine.flatten(2, 3).flatten(-2).transpose(-1, -2)

        scores = (query.unsqueeze(-2) * query.shape[-1] ** -0.5) @ windows(key).transpose(-1, -2)
        return (torch.softmax(scores, dim=-1) @ windows(value)).squeeze(-2)

    def fused(self, query: Tensor, key: Tensor) -> dict[str, Any] | None:
        return {"attn_mask": self.mask if self.made == "buffer"
                else self._coordinates(query.device)}

    def keep(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        near, inside = [], math.prod(self.length)
        for length, window in zip(self.length, self.window, strict=True):
            inside //= length
            start = torch.clamp(q // inside % length - window // 2, 0, length - window)
            place = k // inside % length
            near.append((place >= start) & (place < start + window))
        return functools.reduce(lambda a, b: a & b, near)


class DynamicMask(Attention):
    """exp(A softplus(W v)) is a bias per key and head; a row keeps the keys of the largest.

    Both the bias and the top-k are written out for all rows and keys, as Transformers does.
    """

    has_score = has_keep = True

    def __init__(self, heads: int, head_dim: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.weight = nn.Linear(heads * head_dim, heads, bias=False)
        self.decay = nn.Parameter(torch.linspace(-1.0, 1.0, heads))
        self.value, self.bias, self.least = torch.empty(0), torch.empty(0), torch.empty(0)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        weights = torch.softmax(scores + self._mask(value), dim=-1, dtype=torch.float32)
        return weights.to(query.dtype) @ value

    def _steps(self, value: Tensor) -> Tensor:
        """The bias (B, H, N)."""
        tokens = value.transpose(1, 2).flatten(2)
        return torch.exp(self.decay * F.softplus(self.weight(tokens))).transpose(-1, -2)

    def _mask(self, value: Tensor) -> Tensor:
        least, length = torch.finfo(value.dtype).min, value.shape[-2]
        future = torch.ones(length, length, dtype=torch.bool, device=value.device).triu(1)
        mask = self._steps(value)[:, :, None, :].expand(-1, -1, length, -1)
        mask = mask.masked_fill(future, least)
        best = torch.topk(mask, min(self.window, length), dim=-1, sorted=False).indices
        chosen = torch.zeros_like(mask).scatter(-1, best, 1.0)
        return mask.masked_fill(chosen == 0.0, least)

    def see(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        self.value = value
        with torch.no_grad():
            self.bias = self._steps(value)
        self.least = torch.tensor([[_running(row, self.window) for row in entry]
                                   for entry in self.bias.tolist()])

    def pairs(self, queries: int, keys: int) -> int | None:
        return sum(min(q + 1, self.window) for q in range(queries))

    def fused(self, query: Tensor, key: Tensor) -> dict[str, Any] | None:
        with torch.no_grad():
            return {"attn_mask": self._mask(self.value)}

    def score(self, score: Tensor, b: Any, h: Any, q: Any, k: Any) -> Tensor:
        h = h.to(torch.int64)
        kept = self.bias[b, h, k] >= self.least[b, h, q]
        return torch.where(kept, score + self.bias[b, h, k], -math.inf)

    def keep(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        return q >= k


def _running(row: Sequence[float], count: int) -> list[float]:
    """The count-th largest of row[: i + 1] for every i, minus infinity where there are fewer."""
    best: list[float] = []
    found = []
    for number in row:
        if len(best) < count:
            heapq.heappush(best, number)
        else:
            heapq.heappushpop(best, number)
        found.append(best[0] if len(best) == count else -math.inf)
    return found


@functools.cache
def sentence_lengths(count: int, least: int = 8, most: int = 256) -> tuple[int, ...]:
    """Words and marks of real English texts: the paragraphs of the language reference that comes
    with Python, `count` of those with a length in this range, at even quantiles of all of them."""
    from pydoc_data.topics import topics

    counts = sorted(len(re.findall(r"\w+|[^\w\s]", paragraph))
                    for topic in topics.values() for paragraph in topic.split("\n\n"))
    inside = [n for n in counts if least <= n <= most]
    return tuple(inside[round(i * (len(inside) - 1) / (count - 1))] for i in range(count))


def document_lengths(count: int, total: int, seed: int = 0) -> tuple[int, ...]:
    """Random lengths of at least 1 that sum up to the total."""
    cuts = random.Random(seed).sample(range(1, total), count - 1)
    return tuple(b - a for a, b in itertools.pairwise([0, *sorted(cuts), total]))
