"""Attention in the spellings that authors use, eager against optimised.

Ratios are time of the optimised (or compiled) module / time of the eager one; below 1 is faster.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnopt.timing import format_seconds, interleave

BATCH, HEADS, LENGTH, HEAD_DIM = 2, 8, 256, 64
SCALE = 1 / math.sqrt(HEAD_DIM)
Spelling = Callable[[Tensor, Tensor, Tensor], Tensor]
SPELLINGS: dict[str, Spelling] = {}


def spelling(fn: Spelling) -> Spelling:
    SPELLINGS[fn.__name__] = fn
    return fn


def _causal(q: Tensor, k: Tensor) -> Tensor:
    return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()


@spelling
def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * SCALE, -1) @ v


@spelling
def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@spelling
def sdpa_dense_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_causal(q, k))


@spelling
def masked_fill_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2) * SCALE).masked_fill(~_causal(q, k), float("-inf"))
    return torch.softmax(scores, -1) @ v


@spelling
def added_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.full((q.shape[-2], k.shape[-2]), torch.finfo(q.dtype).min).triu(1)
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(HEAD_DIM) + mask, -1) @ v


@spelling
def upcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(q @ k.transpose(2, 3) * SCALE, -1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, 0.1, False) @ v


@spelling
def grouped_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x[:, :2].repeat_interleave(HEADS // 2, 1) for x in (k, v))
    return torch.softmax(q @ k.transpose(-1, -2) * SCALE, -1) @ v


@spelling
def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhqd,bhkd->bhqk", q, k).mul(SCALE).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


@spelling
def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * SCALE) @ k.mT
    weights = (scores - scores.amax(-1, True)).exp()
    return weights @ v / weights.sum(-1, keepdim=True)


@spelling
def softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(50 * torch.tanh(q @ k.mT * SCALE / 50), -1) @ v


@spelling
def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    slopes = 2.0 ** -torch.arange(1, HEADS + 1)
    distance = torch.arange(k.shape[-2]) - torch.arange(q.shape[-2])[:, None]
    bias = slopes[:, None, None] * distance
    return torch.softmax(q @ k.mT * SCALE + bias, -1) @ v


@spelling
def cosine(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(10 * F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT, -1) @ v


@spelling
def squared_distance(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    distance = (q * q).sum(-1, True) - 2 * q @ k.mT + (k * k).sum(-1)[..., None, :]
    return torch.softmax(-SCALE * distance, -1) @ v


class Wrapped(nn.Module):
    """A function of (q, k, v) as a module."""

    def __init__(self, fn: Spelling) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.fn(q, k, v)


def measure(
    optimize: Callable[..., Any],
    *,
    repeats: int = 21,
    compiled: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Per spelling: status, lowering, eager seconds and the ratios to it."""
    generator = torch.Generator().manual_seed(0)
    args = tuple(torch.randn(BATCH, HEADS, LENGTH, HEAD_DIM, generator=generator)
                 for _ in range(3))
    results: dict[str, Any] = {}
    for name, fn in SPELLINGS.items():
        model = Wrapped(fn).eval()
        optimized = optimize(model, args)
        contestants: dict[str, Callable[..., object]] = {"eager": model, "optimised": optimized}
        if compiled:
            torch.compiler.reset()
            contestants["compiled"] = torch.compile(model)
        with torch.no_grad():
            times = interleave({k: functools.partial(f, *args) for k, f in contestants.items()},
                               repeats)
        site = optimized.report.sites[0] if optimized.report.sites else None
        found: dict[str, Any] = {
            "status": site.status if site else "not found",
            "lowering": site.lowering if site else "",
            "eager_s": statistics.median(times["eager"])}
        for other in list(contestants)[1:]:
            pairs = zip(times[other], times["eager"], strict=True)
            found[other] = statistics.median(a / b for a, b in pairs)
        results[name] = found
        ratios = ", ".join(f"{other} {found[other]:.2f}" for other in list(contestants)[1:])
        say(f"{name:20} {found['status']:10} {found['lowering']:12} "
            f"eager {format_seconds(found['eager_s']):8} ratio: {ratios}")
    return results
