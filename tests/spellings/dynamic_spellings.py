"""Attention whose sparsity is decided at run time, as authors write it.

`Blocks` keeps the best key blocks of every query by pooled scores (MoBA, VMoBA), `TopKeys` the best
keys of every row by a number of their own (Dynamic Mask Attention, as transformers' doge has it).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SPREADS = ("repeat", "expand", "gather", "index")
CHOICES = ("scatter", "one_hot", "kth")
TOP_KEYS = ("scatter", "bool", "kth")


class Blocks(nn.Module):
    """Every query keeps its own block of `size` keys and the `count` - 1 best of those before."""

    def __init__(self, size: int, count: int, choice: str = "scatter", spread: str = "repeat",
                 fused: bool = False, causal: bool = True) -> None:
        super().__init__()
        self.size, self.count, self.fused, self.causal = size, count, fused, causal
        self.choice, self.spread = choice, spread

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        b, h, n, d = query.shape
        blocks = n // self.size
        pooled = key.reshape(b, h, blocks, self.size, d).mean(3)
        gate = torch.einsum("bhid,bhnd->bhin", query, pooled)
        own, each = torch.arange(n) // self.size, torch.arange(blocks)
        if self.causal:
            gate = gate.masked_fill(each > own[:, None], -math.inf)
        gate = gate.masked_fill(each == own[:, None], math.inf)
        best = gate.topk(min(self.count, blocks), dim=-1)
        if self.choice == "one_hot":
            kept = F.one_hot(best.indices, blocks).sum(-2).bool()
        elif self.choice == "kth":
            kept = gate >= best.values[..., -1:]
        else:
            kept = torch.zeros_like(gate, dtype=torch.bool).scatter(-1, best.indices, True)
        keep = self.over_tokens(kept, own)
        if self.causal:
            keep = keep & torch.ones(n, n, dtype=torch.bool).tril()
        if self.fused:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=keep)
        scores = query @ key.transpose(-1, -2) / math.sqrt(d)
        return scores.masked_fill(~keep, -math.inf).softmax(-1) @ value

    def over_tokens(self, kept: Tensor, own: Tensor) -> Tensor:
        n = own.shape[0]
        if self.spread == "expand":
            return kept[..., None].expand(*kept.shape, self.size).reshape(*kept.shape[:-1], n)
        if self.spread == "gather":
            return kept.gather(-1, own.expand(*kept.shape[:-1], n))
        if self.spread == "index":
            return kept[..., own]
        return kept.repeat_interleave(self.size, dim=-1)


class TopKeys(nn.Module):
    """Every row keeps the `count` largest numbers of the keys that it sees, and adds them."""

    def __init__(self, count: int, choice: str = "scatter", fused: bool = True,
                 causal: bool = True) -> None:
        super().__init__()
        self.count, self.choice, self.fused, self.causal = count, choice, fused, causal

    def forward(self, query: Tensor, key: Tensor, value: Tensor, numbers: Tensor,
                padding: Tensor | None = None) -> Tensor:
        low = torch.finfo(query.dtype).min
        groups, n = query.shape[1] // key.shape[1], key.shape[2]
        bias = numbers[:, :, None, :].expand(-1, -1, query.shape[2], -1)
        seen = torch.ones(query.shape[2], n, dtype=torch.bool).tril(n - query.shape[2])
        if not self.causal:
            seen = torch.ones_like(seen)
        if padding is not None:
            seen = seen & padding[:, None, None, :]
        bias = bias.masked_fill(~seen, low)
        if n > self.count:
            bias = self.best(bias, low)
        if groups > 1:
            bias, key, value = (
                x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)
                for x in (bias, key, value))
        if self.fused:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5 + bias
        return scores.softmax(-1) @ value

    def best(self, bias: Tensor, low: float) -> Tensor:
        if self.choice == "kth":
            least = bias.topk(self.count, dim=-1).values[..., -1:]
            return bias.masked_fill(~(bias >= least), low)
        if self.choice == "bool":
            chosen = torch.zeros(bias.shape, dtype=torch.bool, device=bias.device)
            return torch.where(
                chosen.scatter(-1, bias.topk(self.count).indices, True), bias, low)
        places = torch.topk(bias, self.count, dim=-1, largest=True, sorted=False).indices
        active = torch.zeros_like(bias).scatter(-1, places, 1.0)
        return bias.masked_fill(active == 0.0, low)
