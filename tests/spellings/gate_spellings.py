"""Attention behind gates with exact zeros, as authors of routers write it, and near misses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

B, N, H, SHARED, TOP, D = 2, 24, 6, 2, 2, 4
C = H * D


@dataclass(frozen=True)
class Gating:
    """One spelling; `gates` is how many attentions of it have a gate."""

    forward: Callable[..., Any]
    gates: int = 1

    @property
    def name(self) -> str:
        return self.forward.__name__

    def module(self) -> nn.Module:
        made = type("Gating", (nn.Module,), {"forward": self.forward})()
        torch.manual_seed(1)
        made.qkv, made.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        made.router, made.shared = nn.Linear(C, H - SHARED), nn.Linear(C, SHARED)
        made.branch, made.features = nn.Linear(C, 2), nn.Linear(C, D)
        return made.eval()


def projected(self: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    return self.qkv(x).view(x.shape[0], N, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)


def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
    scores = q @ k.transpose(-1, -2) * D**-0.5
    if keep is not None:
        scores = scores.masked_fill(~keep, -math.inf)
    return scores.softmax(-1) @ v


def ended(self: nn.Module, out: Tensor) -> Tensor:
    """(b, h, n, d) to the result."""
    return self.proj(out.transpose(1, 2).reshape(-1, N, C))


def chosen(self: nn.Module, x: Tensor) -> Tensor:
    """Which of all heads a token has, as truth values (b, n, h)."""
    index = self.router(x).topk(TOP, -1).indices
    mask = torch.zeros(x.shape[0], N, H - SHARED).scatter(-1, index, 1.0)
    return F.pad(mask, (SHARED, 0), value=1.0) > 0


# -- heads of a mixture ---------------------------------------------------------------------------
def mixture(self, x):
    """MoH for vision: weighted gates, einsum behind a fused call."""
    flat = x.reshape(-1, C)
    gates = self.router(flat).softmax(-1)
    mask = F.one_hot(gates.topk(TOP, -1).indices, H - SHARED).sum(1)
    gates = gates * mask
    gates /= gates.sum(-1, keepdim=True).clamp(min=1e-7)
    gates = torch.cat([self.shared(flat).softmax(-1) * SHARED, gates * TOP], -1)
    out = F.scaled_dot_product_attention(*projected(self, x)).transpose(1, 2)
    return self.proj(torch.einsum("bne,bned->bned", gates.view(-1, N, H), out).reshape(-1, N, C))


def mixture_multiplied(self, x):
    out = attend(*projected(self, x))
    gates = self.router(x).softmax(-1) * chosen(self, x)[..., SHARED:]
    gates = torch.cat([torch.ones(x.shape[0], N, SHARED), gates], -1)
    return ended(self, out * gates.transpose(1, 2).unsqueeze(-1))


def mixture_of_norms(self, x):
    """MoH for language models: a binary gate by the norms of the queries, causal."""
    q, k, v = projected(self, x)
    routed = q.norm(dim=-1)[:, SHARED:]
    index = (routed / routed.std(1, keepdim=True)).softmax(1).topk(TOP, 1).indices
    mask = torch.zeros_like(routed).scatter_(1, index, 1)
    mask = torch.cat([torch.ones_like(mask[:, :SHARED]), mask], 1)
    keep = torch.ones(N, N, dtype=torch.bool).tril()
    return ended(self, mask.unsqueeze(-1) * attend(q, k, v, keep))


def mixture_filled(self, x):
    out = attend(*projected(self, x)).transpose(1, 2)
    return self.proj(out.masked_fill(~chosen(self, x).unsqueeze(-1), 0.0).flatten(2))


def mixture_where(self, x):
    keep = chosen(self, x).transpose(1, 2)[..., None]
    out = attend(*projected(self, x))
    return ended(self, torch.where(keep, out, torch.zeros_like(out)))


def mixture_hidden_logits(self, x):
    """A softmax over the chosen heads alone, and a scale behind it."""
    logits = self.router(x).masked_fill(~chosen(self, x)[..., SHARED:], -math.inf)
    gates = F.pad(logits.softmax(-1), (SHARED, 0), value=1.0).transpose(1, 2)
    return ended(self, attend(*projected(self, x)) * 2.0 * gates.unsqueeze(-1))


def tokens_dropped(self, x):
    """A gate of tokens: that of all heads."""
    gate = (self.branch(x)[..., :1] > 0).to(x.dtype)
    out = attend(*projected(self, x)).transpose(1, 2).reshape(-1, N, C)
    return self.proj(out * gate)


# -- branches -------------------------------------------------------------------------------------
def routed(self: nn.Module, x: Tensor) -> Tensor:
    """0 or 1 for each sample."""
    return self.branch(x.mean(1)).softmax(-1).argmax(-1)


def near() -> Tensor:
    at = torch.arange(N)
    back = at[:, None] - at
    return (back >= 0) & ((back < 6) | (at < 2))


def branches_blended(self, x):
    q, k, v = projected(self, x)
    z = routed(self, x).to(x.dtype).view(-1, 1, 1, 1)
    full = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return ended(self, z * full + (1 - z) * attend(q, k, v, near()))


def branches_chosen(self, x):
    q, k, v = projected(self, x)
    full = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    sparse = F.scaled_dot_product_attention(q, k, v, attn_mask=near())
    return ended(self, torch.where(routed(self, x).bool()[:, None, None, None], full, sparse))


def branches_by_one_hot(self, x):
    q, k, v = projected(self, x)
    z = F.one_hot(routed(self, x), 2).to(x.dtype)[:, None, None]
    both = attend(q, k, v, near()) * z[..., 0:1] + attend(q, k, v) * z[..., 1:2]
    return ended(self, both)


def branches_of_heads(self, x):
    """Each head of each sample has its branch."""
    q, k, v = projected(self, x)
    sparse = torch.round(self.router(x.mean(1)).sigmoid()).repeat(1, 2)[:, :H, None, None]
    return ended(self, attend(q, k, v) * (sparse == 0) + attend(q, k, v, near()) * (sparse != 0))


TABLE = [
    Gating(mixture), Gating(mixture_multiplied), Gating(mixture_of_norms), Gating(mixture_filled),
    Gating(mixture_where), Gating(mixture_hidden_logits), Gating(tokens_dropped),
    Gating(branches_blended, 2), Gating(branches_chosen, 2), Gating(branches_by_one_hot, 2),
    Gating(branches_of_heads, 2),
]


# -- near misses ----------------------------------------------------------------------------------
def sigmoid_gate(self, x):
    gate = self.branch(x)[..., :1].sigmoid().unsqueeze(1)
    return ended(self, attend(*projected(self, x)) * gate)


def gate_of_features(self, x):
    gate = (self.features(x) > 0).to(x.dtype).unsqueeze(1)
    return ended(self, attend(*projected(self, x)) * gate)


def straight_through(self, x):
    soft = self.branch(x).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), 2) - soft.detach() + soft
    return ended(self, attend(*projected(self, x)) * hard[:, None, :, :1])


def read_twice(self, x):
    out = attend(*projected(self, x))
    gate = chosen(self, x).transpose(1, 2).unsqueeze(-1)
    return ended(self, out * gate) + ended(self, out)


def other_branch(self, x):
    """What is not attended is passed on."""
    q, k, v = projected(self, x)
    gate = chosen(self, x).transpose(1, 2).unsqueeze(-1)
    return ended(self, torch.where(gate, attend(q, k, v), v))


def gate_before_a_sum(self, x):
    out = attend(*projected(self, x)) + 1.0
    return ended(self, out * chosen(self, x).transpose(1, 2).unsqueeze(-1))


NEAR = [Gating(f, 0) for f in (sigmoid_gate, gate_of_features, straight_through, read_twice,
                               other_branch, gate_before_a_sum)]
