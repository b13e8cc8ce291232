"""A Transformer encoder in plain PyTorch, its attention spelled out as most authors spell it.

Post-norm layers; scores are divided by sqrt(head_dim) and a padding mask (1 = token, 0 = padding)
becomes an additive one of the dtype's smallest number.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """softmax(Q K^T / sqrt(head_dim) + mask) V with hidden (batch, length, size)."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, size // heads
        self.query, self.key, self.value, self.out = (nn.Linear(size, size) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (self.split(f(x)) for f in (self.query, self.key, self.value))
        scores = query @ key.transpose(-1, -2) / math.sqrt(self.head_dim) + mask
        context = torch.softmax(scores, dim=-1) @ value
        return self.out(context.transpose(1, 2).reshape(x.shape))


class Layer(nn.Module):
    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.attention = SelfAttention(size, heads)
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.feed = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x, mask))
        return self.norm2(x + self.feed(x))


class Encoder(nn.Module):
    """Hidden states (batch, length, size) and keep mask (batch, length) -> hidden states."""

    def __init__(self, layers: int, size: int, heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(size, heads) for _ in range(layers))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        mask = (1.0 - keep[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        for layer in self.layers:
            x = layer(x, mask)
        return x


def encoder(
    layers: int, size: int, heads: int, batch: int, length: int
) -> tuple[Encoder, tuple[Tensor, Tensor]]:
    """An encoder in eval mode and arguments for it; the last quarter of each second row is padding.

    The same numbers at every call; torch's own random state is left alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Encoder(layers, size, heads).eval()
        x = torch.randn(batch, length, size)
    keep = torch.ones(batch, length)
    keep[1::2, length - length // 4:] = 0
    return model, (x, keep)
