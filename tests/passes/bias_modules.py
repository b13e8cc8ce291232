"""Attention with a bias as timm and OpenFold spell it, small and with drawn parameters.

Each function gives a module and the keyword arguments of a call.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.bias_spellings import beit_index, levit_index, shift_mask, swin_index

Made = tuple[nn.Module, dict[str, Any]]
HEADS, WIDTH = 3, 24


def _drawn(module: nn.Module, *shape: int) -> Made:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (
                p[0].numel() ** -0.5 if p.ndim == 2 and p.shape[0] != HEADS else 1.0))
    return module.eval(), {"x": torch.randn(*shape, generator=generator)}


class Shifted(nn.Module):
    """A shifted window block: roll, partition, SDPA with bias and mask in one tensor, and back."""

    mask: Tensor

    def __init__(self, side: int = 12, window: int = 6) -> None:
        super().__init__()
        self.window, self.shift = window, window // 2
        self.table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, HEADS))
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("index", swin_index((window, window)), persistent=False)
        self.register_buffer("mask", shift_mask(side, window), persistent=False)

    def bias(self) -> Tensor:
        n = self.window**2
        return self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()[None]

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        x = x.view(b, h // self.window, self.window, w // self.window, self.window, c)
        x = x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, self.window**2, c)
        count, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(count, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        windows = self.mask.shape[0]
        mask = self.mask.view(1, windows, 1, n, n).expand(count // windows, -1, HEADS, -1, -1)
        mask = self.bias() + mask.reshape(-1, HEADS, n, n)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = self.proj(x.transpose(1, 2).reshape(count, n, c))
        x = x.view(b, h // self.window, w // self.window, self.window, self.window, c)
        x = x.permute(0, 1, 3, 2, 4, 5).contiguous().view(b, h, w, c)
        return torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2))


def swin() -> Made:
    return _drawn(Shifted(), 2, 12, 12, WIDTH)


class ClassToken(nn.Module):
    """A bias by offset with three entries for a class token (BEiT), fused."""

    def __init__(self, grid: tuple[int, int] = (6, 6)) -> None:
        super().__init__()
        entries = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
        self.table = nn.Parameter(torch.zeros(entries, HEADS))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(WIDTH)) for _ in range(2))
        self.register_buffer("k_bias", torch.zeros(WIDTH), persistent=False)
        self.register_buffer("index", beit_index(grid), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = F.linear(x, self.qkv.weight, torch.cat((self.q_bias, self.k_bias, self.v_bias)))
        q, k, v = qkv.reshape(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()[None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return out.transpose(1, 2).reshape(b, n, c)


def beit() -> Made:
    return _drawn(ClassToken(), 2, 37, WIDTH)


class Distances(nn.Module):
    """A bias by distance along each axis, kept in a dictionary when in evaluation mode (LeViT)."""

    def __init__(self, side: int = 8, stride: int = 1) -> None:
        super().__init__()
        self.side, self.stride, self.kept = side, stride, {}
        index = levit_index((side, side)).view(side, side, -1)[::stride, ::stride]
        self.biases = nn.Parameter(torch.zeros(HEADS, side * side))
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.register_buffer("idxs", index.flatten(0, 1), persistent=False)

    def bias(self, device: torch.device) -> Tensor:
        if torch.jit.is_tracing() or self.training:
            return self.biases[:, self.idxs]
        if str(device) not in self.kept:
            self.kept[str(device)] = self.biases[:, self.idxs]
        return self.kept[str(device)]

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        few = x.view(b, self.side, self.side, c)[:, :: self.stride, :: self.stride].flatten(1, 2)
        q = self.q(few).view(b, -1, HEADS, c // HEADS).permute(0, 2, 1, 3)
        k, v = self.kv(x).view(b, n, HEADS, -1).split([c // HEADS, 2 * c // HEADS], dim=3)
        k, v = k.permute(0, 2, 3, 1), v.permute(0, 2, 1, 3)
        scores = q @ k * (c // HEADS) ** -0.5 + self.bias(x.device)
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, -1, 2 * c)


def levit() -> Made:
    return _drawn(Distances(), 2, 64, WIDTH)


def levit_downsample() -> Made:
    return _drawn(Distances(stride=2), 2, 64, WIDTH)


class Pooled(nn.Module):
    """Decomposed positions of pooled queries and keys, behind `extra` class tokens (MViTv2)."""

    def __init__(self, extra: int, side: int = 16, q_stride: int = 1, k_stride: int = 2) -> None:
        super().__init__()
        self.extra = extra
        self.q_side, self.k_side = side // q_stride, side // k_stride
        self.q_stride, self.k_stride = q_stride, k_stride
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        longest = 2 * max(self.q_side, self.k_side) - 1
        self.rel_h, self.rel_w = (
            nn.Parameter(torch.zeros(longest, WIDTH // HEADS)) for _ in range(2))
        self.side = side

    def pool(self, x: Tensor, stride: int) -> Tensor:
        b, h, _, c = x.shape
        first, rest = x[:, :, : self.extra], x[:, :, self.extra :]
        rest = rest.reshape(b * h, self.side, self.side, c).permute(0, 3, 1, 2)
        rest = F.avg_pool2d(rest, stride, stride).flatten(2).transpose(1, 2)
        rest = rest.reshape(b, h, -1, c)
        return torch.cat((first, rest), dim=2) if self.extra else rest

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k, v = self.pool(q, self.q_stride), self.pool(k, self.k_stride), \
            self.pool(v, self.k_stride)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        queries, keys = self.q_side, self.k_side
        ratio_q, ratio_k = max(keys / queries, 1.0), max(queries / keys, 1.0)
        far = torch.arange(queries)[:, None] * ratio_q - torch.arange(keys)[None] * ratio_k
        far = (far + (keys - 1) * ratio_k).long()
        e = self.extra
        r_q = q[:, :, e:].reshape(b, HEADS, queries, queries, -1)
        rel_h = torch.einsum("byhwc,hkc->byhwk", r_q, self.rel_h[far])
        rel_w = torch.einsum("byhwc,wkc->byhwk", r_q, self.rel_w[far])
        inner = scores[:, :, e:, e:].view(b, -1, queries, queries, keys, keys)
        inner = (inner + rel_h.unsqueeze(-1) + rel_w.unsqueeze(-2)).view(b, -1, queries**2, keys**2)
        if e:
            scores[:, :, e:, e:] = inner
        else:
            scores = inner
        out = scores.softmax(-1) @ v
        return (out + q).transpose(1, 2).reshape(b, -1, c)


def mvit() -> Made:
    return _drawn(Pooled(extra=0), 2, 256, WIDTH)


def mvit_class_token() -> Made:
    return _drawn(Pooled(extra=1), 2, 257, WIDTH)


class Triangle(nn.Module):
    """Attention along the rows of a pair representation, with a bias made from it (AlphaFold 2)."""

    def __init__(self, starting: bool) -> None:
        super().__init__()
        self.starting = starting
        self.norm, self.pair = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HEADS, bias=False)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.gate, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if not self.starting:
            x, mask = x.transpose(-2, -3), mask.transpose(-1, -2)
        x = self.norm(x)
        biases = [(1e9 * (mask - 1))[..., :, None, None, :],
                  self.pair(x).permute(0, 3, 1, 2).unsqueeze(-4)]
        q, k, v = (p(x).view(*x.shape[:-1], HEADS, -1).transpose(-2, -3)
                   for p in (self.q, self.k, self.v))
        q /= math.sqrt(WIDTH // HEADS)
        a = torch.matmul(q, k.transpose(-1, -2))
        for bias in biases:
            a += bias
        o = torch.matmul(F.softmax(a, dim=-1), v).transpose(-2, -3)
        g = torch.sigmoid(self.gate(x)).view(*x.shape[:-1], HEADS, -1)
        o = self.out((o * g).flatten(-2))
        return o if self.starting else o.transpose(-2, -3)


def _triangle(starting: bool) -> Made:
    module, kwargs = _drawn(Triangle(starting), 1, 12, 12, WIDTH)
    mask = torch.ones(1, 12, 12)
    mask[:, -3:], mask[:, :, -3:] = 0, 0
    return module, {**kwargs, "mask": mask}


def triangle_rows() -> Made:
    return _triangle(True)


def triangle_columns() -> Made:
    return _triangle(False)


class Slopes(nn.Module):
    """A penalty for distance that is made at each call, beside a causal mask (ALiBi)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        at = torch.arange(n)
        slopes = torch.tensor([2.0 ** (-8 * (h + 1) / HEADS) for h in range(HEADS)])
        bias = -slopes.view(-1, 1, 1) * (at[:, None] - at[None, :]).abs()
        bias = bias.masked_fill(at[None, :] > at[:, None], float("-inf"))
        scores = q @ k.mT / math.sqrt(c // HEADS) + bias
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c)


def alibi() -> Made:
    return _drawn(Slopes(), 2, 31, WIDTH)


