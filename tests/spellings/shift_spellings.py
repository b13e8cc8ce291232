"""Scores shifted by a maximum, shared by two softmaxes, read at one row, mixed beside a softmax
written out, or one number per key that is part of a wider projection.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.spellings.program import CROSS, QKV, Spelling

SCALE = 0.25
MASKED = QKV + ", mask: add b 1 1 s"
TWO = QKV + ", q2: b h s w, k2: b h s w, v2: b h s e"


def scored(q, k):
    return q @ k.transpose(-2, -1) * SCALE


def by_softmax(self, q, k, v):
    return scored(q, k).softmax(-1) @ v


def by_softmax_masked(self, q, k, v, mask):
    return (scored(q, k) + mask).softmax(-1) @ v


def divided(scores):
    weights = scores.exp()
    return weights / weights.sum(-1, keepdim=True)


# -- a maximum subtracted -------------------------------------------------------------------------
def scaled_maximum(self, q, k, v, mask):
    scaled = (scored(q, k) + mask) / 32
    return ((scaled - scaled.amax(-1).unsqueeze(-1)) * 32).softmax(-1) @ v


def scaled_maximum_by_hand(self, q, k, v, mask):
    scaled = (scored(q, k) + mask) * 0.5
    return divided((scaled - scaled.max(-1, keepdim=True)[0]) / 0.5) @ v


def maximum_less_scores(self, q, k, v):
    scores = -scored(q, k)
    return (scores.amax(-1, keepdim=True).expand_as(scores) - scores).softmax(-1) @ v


def multiple_of_maximum(self, q, k, v):
    scores = scored(q, k)
    return (scores - 0.5 * scores.amax(-1, keepdim=True)).softmax(-1) @ v


def maximum_of_all(self, q, k, v):
    scores = scored(q, k)
    return (scores - scores.max()).softmax(-1) @ v


def maximum_of_map(self, q, k, v):
    scores = scored(q, k)
    return divided(scores - scores.amax((-2, -1), keepdim=True).detach()) @ v


def clamped(self, q, k, v):
    return scored(q, k).clamp(min=-1.0, max=1.0).softmax(-1) @ v


def clamped_twice(self, q, k, v):
    scores = torch.maximum(scored(q, k), torch.tensor(-1.0, dtype=q.dtype))
    return scores.clamp_max(1.0).softmax(-1) @ v


# -- scores of two softmaxes ----------------------------------------------------------------------
def two_products(self, q, k, v, q2, k2, v2):
    first, second = scored(q, k), q2 @ k2.transpose(-2, -1) / 2
    return (second + first).softmax(-1) @ v, (first + second).softmax(-1) @ v2


def two_products_joined(self, q, k, v, q2, k2, v2):
    query, key = torch.cat([q * SCALE, q2 * 0.5], -1), torch.cat([k, k2], -1)
    return tuple(F.scaled_dot_product_attention(query, key, x, scale=1.0) for x in (v, v2))


def both_ways(self, q, k, v):
    scores = scored(q, k)
    return scores.softmax(-1) @ v, scores.transpose(-2, -1).softmax(-1) @ q


def both_ways_apart(self, q, k, v):
    return (F.scaled_dot_product_attention(q, k, v, scale=SCALE),
            F.scaled_dot_product_attention(k, q, q, scale=SCALE))


# -- one row of the scores, or of the weights -----------------------------------------------------
def causal(scores):
    queries, keys = (torch.arange(n) for n in scores.shape[-2:])
    return scores.masked_fill(keys > queries[:, None], -torch.inf)


def one_row_of_scores(self, q, k, v):
    return causal(scored(q, k))[:, :, 3:4].softmax(-1) @ v


def one_row_of_weights(self, q, k, v):
    return (causal(scored(q, k)).softmax(-1)[:, :, 3].unsqueeze(-2)) @ v


def first_row_by_hand(self, q, k, v):
    first = scored(q, k)[:, :, :1]
    return divided(first - first.amax(-1, keepdim=True)) @ v


def first_query(self, q, k, v):
    return F.scaled_dot_product_attention(q[:, :, :1], k, v, scale=SCALE)


def one_folded_head(self, q, k, v):
    return scored(q, k).flatten(0, 1)[3].softmax(-1) @ v[0, 3]


def one_head(self, q, k, v):
    return F.scaled_dot_product_attention(q[:1, 3], k[:1, 3], v[:1, 3], scale=SCALE)[0]


# -- heads mixed, softmax written out -------------------------------------------------------------
def with_mixers(self, sizes):
    self.before = nn.Parameter(torch.randn(sizes["h"], sizes["h"]) / 2)
    self.after = nn.Parameter(torch.randn(sizes["h"], sizes["h"]) / 2)


def mixed_by_hand(self, q, k, v):
    scores = torch.einsum("gh,bhqk->bgqk", self.before, scored(q, k))
    weights = divided(scores - scores.amax(-1, keepdim=True))
    return torch.einsum("gh,bhqk->bgqk", self.after, weights) @ v


def mixed_by_softmax(self, q, k, v):
    weights = F.conv2d(scored(q, k), self.before[:, :, None, None]).softmax(-1)
    return F.conv2d(weights, self.after[:, :, None, None]) @ v


# -- one logit per key ----------------------------------------------------------------------------
def with_context(self, sizes):
    self.project = nn.Conv2d(sizes["e"], 1 + 2 * sizes["e"], 1)


def context_of_products(self, x):
    width = x.size(1)
    logit, key, value = self.project(x).split([1, width, width], dim=1)
    context = (key * logit.softmax(-1)).sum(dim=-1, keepdim=True)
    return value.relu() * context.expand_as(value)


def context_by_matmul(self, x):
    width = x.size(1)
    weight, bias = self.project.weight[:, :, 0, 0], self.project.bias
    hidden = F.linear(x.movedim(1, -1), weight, bias)
    weights = hidden[..., :1].softmax(dim=-2)
    context = weights.transpose(-2, -1) @ hidden[..., 1: width + 1]
    return (hidden[..., width + 1:].relu() * context).movedim(-1, 1)


def _case(name, first, second, inputs=QKV, setup=None, **more):
    return Spelling(name, first, second, inputs, setup, **more)


SHIFTS = [
    _case("scaled maximum", scaled_maximum, by_softmax_masked, MASKED),
    _case("scaled maximum by hand", scaled_maximum_by_hand, by_softmax_masked, MASKED),
    _case("maximum less scores", maximum_less_scores, by_softmax, CROSS),
    _case("multiple of the maximum", multiple_of_maximum, by_softmax),
    _case("maximum of all / of each map", maximum_of_all, maximum_of_map),
    _case("clamped", clamped, clamped_twice),
]
SHARED = [
    _case("two products, two softmaxes", two_products, two_products_joined, TWO),
    _case("both ways", both_ways, both_ways_apart, CROSS),
    _case("one row, causal", one_row_of_scores, one_row_of_weights),
    _case("first row by hand", first_row_by_hand, first_query, CROSS),
    _case("one head of a folded axis", one_folded_head, one_head),
    _case("heads mixed by hand", mixed_by_hand, mixed_by_softmax, setup=with_mixers),
    _case("a logit per key from a split", context_of_products, context_by_matmul, "x: b e w s",
          with_context),
]
SHIFTED = SHIFTS + SHARED
