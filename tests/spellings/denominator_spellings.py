"""Softmax with one more term in its denominator: off by one, by shifts, columns and logarithms."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.spellings.program import QKV, Spelling

SCALE = 0.25
KEYS = QKV + ", mask: keep b 1 1 s"


def scored(q, k):
    return q @ k.transpose(-2, -1) * SCALE


def off_by_one_above_zero(self, q, k, v):
    scores = scored(q, k)
    highest = scores.amax(-1, keepdim=True).clamp(min=0)
    weights = (scores - highest).exp()
    return (weights / (weights.sum(-1, keepdim=True) + (-highest).exp())) @ v


def off_by_one_column(self, q, k, v):
    scores = scored(q, k)
    scores = torch.cat([scores, torch.zeros_like(scores[..., :1])], -1)
    return scores.softmax(-1)[..., :-1] @ v


def off_by_one_logarithms(self, q, k, v):
    scores = scored(q, k)
    total = torch.logsumexp(scores, -1, keepdim=True)
    return torch.exp(scores - torch.logaddexp(total, torch.zeros(()))) @ v


def off_by_one_softplus(self, q, k, v):
    scores = scored(q, k)
    return (scores - F.softplus(scores.logsumexp(-1, keepdim=True))).exp() @ v


def one_beside_shifted(self, q, k, v):
    scores = scored(q, k)
    weights = torch.exp(scores - scores.max(-1, keepdim=True).values)
    return (weights / (1 + weights.sum(-1, keepdim=True))) @ v


def one_beside_shifted_after(self, q, k, v):
    scores = scored(q, k)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights @ v) / (weights.sum(-1, keepdim=True) + 1)


def off_by_one_masked(self, q, k, v, mask):
    scores = scored(q, k).masked_fill(~mask, -torch.inf)
    highest = scores.amax(-1, keepdim=True)
    weights = (scores - highest).exp()
    return (weights / (weights.sum(-1, keepdim=True) + torch.exp(-highest))) @ v


def off_by_one_masked_after(self, q, k, v, mask):
    scores = torch.where(mask, scored(q, k), -torch.inf)
    highest = scores.max(-1, keepdim=True)[0].detach()
    weights = (scores - highest).exp()
    return (weights @ v) / (torch.exp(0 - highest) + weights.sum(-1, keepdim=True))


def small_number_beside(self, q, k, v, mask):
    scores = scored(q, k).masked_fill(~mask, -torch.inf)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights / (weights.sum(-1, keepdim=True) + 1e-3)) @ v


def small_number_beside_after(self, q, k, v, mask):
    scores = torch.where(~mask, -torch.inf, scored(q, k))
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights @ v) / (1e-3 + weights.sum(-1, keepdim=True))


DENOMINATORS = [
    Spelling("softmax plus one, shifted", off_by_one_above_zero, off_by_one_column),
    Spelling("softmax plus one, logarithms", off_by_one_logarithms, off_by_one_softplus),
    Spelling("softmax plus one, masked", off_by_one_masked, off_by_one_masked_after, KEYS),
    Spelling("one beside the shifted sum", one_beside_shifted, one_beside_shifted_after),
    Spelling("a small number beside the sum", small_number_beside, small_number_beside_after,
             KEYS),
]
