"""Attentions with a bias, each spelled as a model's author does.

    Buckets      a learned number per head and bucket of the distance (T5: arXiv 1910.10683); the
                 buckets are computed at each call
    Window       a learned number per head and offset on a grid, and -100 between the regions of
                 a shifted window (Swin: arXiv 2103.14030); batch entries are the windows of a map
    AxisRows     a product of the query with a learned vector per row and one per column of the key
                 (SAM: arXiv 2304.02643)
    PairBias     a number per head and pair that all batch entries share, an input (AlphaFold 2:
                 doi.org/10.1038/s41586-021-03819-2, 1.6.5)
    SwinStages   what a Swin model does between its linear layers, of all stages

See `attnopt.bench.attentions` for what the methods mean.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnopt.bench.attentions import Attention


def _drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Buckets(Attention):
    """Distances up to `buckets` / 4 have a number each, longer ones share it logarithmically."""

    has_score = True

    def __init__(self, heads: int, buckets: int = 32, longest: int = 128) -> None:
        super().__init__()
        self.buckets, self.longest = buckets, longest
        self.table = nn.Parameter(_drawn(buckets, heads))

    def bucket(self, far: Tensor) -> Tensor:
        half = self.buckets // 2
        exact = half // 2
        side = (far > 0).long() * half
        far = far.abs()
        large = exact + (torch.log(far.float() / exact) / math.log(self.longest / exact)
                         * (half - exact)).long()
        return side + torch.where(far < exact, far, large.clamp(max=half - 1))

    def change(self, scores: Tensor) -> Tensor:
        queries, keys = (torch.arange(n, device=scores.device) for n in scores.shape[-2:])
        index = self.bucket(keys[None, :] - queries[:, None])
        return scores + F.embedding(index, self.table).permute(2, 0, 1).unsqueeze(0)

    def see(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        ends = torch.arange(1 - query.shape[-2], key.shape[-2], device=query.device)
        self.by_distance = self.table.detach()[self.bucket(ends)]
        self.zero = query.shape[-2] - 1

    def fused(self, query: Tensor, key: Tensor) -> dict[str, Any] | None:
        with torch.no_grad():
            empty = torch.zeros(1, 1, query.shape[-2], key.shape[-2], device=query.device)
            return {"attn_mask": self.change(empty).to(query.dtype)}

    def score(self, score: Tensor, b: Any, h: Any, q: Any, k: Any) -> Tensor:
        return score + self.by_distance[k - q + self.zero, _whole(h)]


class Window(Attention):
    """Tokens of a `side` x `side` window; there are 2 x 2 of them in the map."""

    has_score = True
    index: Tensor
    mask: Tensor

    def __init__(self, heads: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.table = nn.Parameter(_drawn((2 * side - 1) ** 2, heads))
        self.register_buffer("index", _offsets(side))
        self.register_buffer("mask", _regions(2 * side, side))

    def bias(self) -> Tensor:
        n = self.side**2
        return self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()[None]

    def change(self, scores: Tensor) -> Tensor:
        count, heads, n, _ = scores.shape
        scores = scores + self.bias()
        scores = scores.view(count // 4, 4, heads, n, n) + self.mask.unsqueeze(1).unsqueeze(0)
        return scores.view(-1, heads, n, n)

    def see(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        self.dense = self.bias().detach()[0]

    def fused(self, query: Tensor, key: Tensor) -> dict[str, Any] | None:
        with torch.no_grad():
            mask = self.mask[:, None].repeat(query.shape[0] // 4, 1, 1, 1)
            return {"attn_mask": (self.bias() + mask).to(query.dtype)}

    def score(self, score: Tensor, b: Any, h: Any, q: Any, k: Any) -> Tensor:
        return score + self.dense[_whole(h), q, k] + self.mask[b % 4, q, k]


class AxisRows(Attention):
    """Image tokens of `side` x `side`; learned vectors for each distance along either axis."""

    has_score = True

    def __init__(self, side: int, head_dim: int) -> None:
        super().__init__()
        self.side = side
        self.rel_h, self.rel_w = (
            nn.Parameter(_drawn(2 * side - 1, head_dim, seed=s) / head_dim**0.5) for s in (1, 2))

    def by_axis(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Terms (B, H, row, column, side) of every query for a key's row and for its column."""
        place = torch.arange(self.side, device=query.device)
        far = place[:, None] - place[None, :] + self.side - 1
        rows = query.reshape(*query.shape[:2], self.side, self.side, -1)
        return (torch.einsum("bnhwc,hkc->bnhwk", rows, self.rel_h[far].to(query)),
                torch.einsum("bnhwc,wkc->bnhwk", rows, self.rel_w[far].to(query)))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rel_h, rel_w = self.by_axis(query)
        bias = rel_h[..., :, None] + rel_w[..., None, :]
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        return torch.softmax(scores + bias.reshape(scores.shape), dim=-1) @ value

    def see(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        with torch.no_grad():
            self.terms = [t.flatten(2, 3).to(query.dtype) for t in self.by_axis(query.double())]

    def fused(self, query: Tensor, key: Tensor) -> dict[str, Any] | None:
        rel_h, rel_w = self.terms
        return {"attn_mask": (rel_h[..., :, None] + rel_w[..., None, :]).flatten(-2)}

    def score(self, score: Tensor, b: Any, h: Any, q: Any, k: Any) -> Tensor:
        rel_h, rel_w = self.terms
        h = _whole(h)
        return score + rel_h[b, h, q, k // self.side] + rel_w[b, h, q, k % self.side]


class PairBias(Attention):
    """All rows of a pair representation attend with the same bias (1, H, N, N)."""

    has_score = True

    def __init__(self, heads: int, length: int) -> None:
        super().__init__()
        self.pair = _drawn(1, heads, length, length)

    def extras(self) -> tuple[Tensor, ...]:
        return (self.pair,)

    def forward(self, query: Tensor, key: Tensor, value: Tensor,  # type: ignore[override]
                pair: Tensor) -> Tensor:
        scores = (query / math.sqrt(query.shape[-1])) @ key.transpose(-1, -2)
        scores += pair
        return torch.softmax(scores, dim=-1) @ value

    def fused(self, query: Tensor, key: Tensor) -> dict[str, Any] | None:
        return {"attn_mask": self.pair}

    def score(self, score: Tensor, b: Any, h: Any, q: Any, k: Any) -> Tensor:
        return score + self.pair[0][_whole(h), q, k]


class SwinStages(nn.Module):
    """Shift, windows, scores with bias and mask, and back: the blocks of all stages (Swin-T).

    forward: maps (1, side, side, 3 * heads * head_dim) of query, key and value, one per stage;
    each block of a stage starts from the same ones.
    """

    index: Tensor

    def __init__(self, side: int = 56, window: int = 7, heads: tuple[int, ...] = (3, 6, 12, 24),
                 depths: tuple[int, ...] = (2, 2, 6, 2), head_dim: int = 32) -> None:
        super().__init__()
        self.window, self.heads, self.head_dim = window, heads, head_dim
        self.sides = tuple(side >> stage for stage in range(len(heads)))
        self.tables = nn.ModuleList(nn.ParameterList(
            nn.Parameter(_drawn((2 * window - 1) ** 2, count, seed=block))
            for block in range(depth)) for count, depth in zip(heads, depths, strict=True))
        self.register_buffer("index", _offsets(window))
        for stage, length in enumerate(self.sides):
            self.register_buffer(
                f"mask{stage}", _regions(length, window) if length > window else None)

    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(_drawn(1, n, n, 3 * h * self.head_dim, seed=n)
                     for n, h in zip(self.sides, self.heads, strict=True))

    def forward(self, *maps: Tensor) -> tuple[Tensor, ...]:
        of_stages = cast("Iterable[Iterable[Tensor]]", self.tables)
        return tuple(self.block(x, stage, table, block % 2)
                     for stage, (x, tables) in enumerate(zip(maps, of_stages, strict=True))
                     for block, table in enumerate(tables))

    def block(self, x: Tensor, stage: int, table: Tensor, odd: int) -> Tensor:
        window, heads = self.window, self.heads[stage]
        mask = getattr(self, f"mask{stage}")
        shift = window // 2 if odd and mask is not None else 0
        b, height, width, channels = x.shape
        if shift:
            x = torch.roll(x, shifts=(-shift, -shift), dims=(1, 2))
        x = x.view(b, height // window, window, width // window, window, channels)
        x = x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window * window, channels)
        count, n, _ = x.shape
        q, k, v = x.view(count, n, 3, heads, self.head_dim).permute(2, 0, 3, 1, 4)
        scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        bias = table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
        scores = scores + bias.unsqueeze(0)
        if shift:
            scores = scores.view(b, count // b, heads, n, n) + mask.unsqueeze(1).unsqueeze(0)
            scores = scores.view(-1, heads, n, n)
        x = (scores.softmax(-1) @ v).transpose(1, 2).reshape(count, n, channels // 3)
        x = x.view(b, height // window, width // window, window, window, channels // 3)
        x = x.permute(0, 1, 3, 2, 4, 5).contiguous().view(b, height, width, channels // 3)
        return torch.roll(x, shifts=(shift, shift), dims=(1, 2)) if shift else x


def _whole(h: Any) -> Any:
    return h.long() if isinstance(h, Tensor) else h


def _offsets(side: int) -> Tensor:
    """The place of every pair of tokens of a square in a table of offsets."""
    y, x = (torch.arange(side**2) // side, torch.arange(side**2) % side)
    far = [t[:, None] - t[None, :] + side - 1 for t in (y, x)]
    return far[0] * (2 * side - 1) + far[1]


def _regions(length: int, window: int) -> Tensor:
    """0 or -100 (windows, tokens, tokens): were two tokens neighbours before the shift?"""
    ids = torch.zeros(length, length)
    parts = (slice(0, -window), slice(-window, -(window // 2)), slice(-(window // 2), None))
    for number, (rows, columns) in enumerate(itertools.product(parts, parts)):
        ids[rows, columns] = number
    count = length // window
    ids = ids.view(count, window, count, window).transpose(1, 2).reshape(count**2, window**2)
    return torch.where(ids[:, :, None] == ids[:, None, :], 0.0, -100.0)
