"""Programs with a softmax, a sigmoid or a chain of products that are not attention, or not only.

`expect` says what may become of them:

    untouched     no site of kind "attention" is taken
    unrewritten   a site may be canonical (the author's nodes stay) but not rewritten
    reassociable  a site of kind "reassociable" is reported and kept
    any           attention with a trap: whatever is done, values and gradients stay right
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.spellings.program import CROSS, MOVING, QKV, Setup

SCALE = 0.25


@dataclass(frozen=True)
class NearMiss:
    """A function `f(self, *inputs)` and what may become of it."""

    name: str
    forward: Callable[..., Any]
    inputs: str = QKV
    setup: Setup | None = None
    expect: str = "untouched"
    gradients: bool = True
    moving: str = MOVING


def weights_of(q, k):
    return torch.softmax(q @ k.transpose(-2, -1) * SCALE, dim=-1)


# -- results whose shape changes in place ----------------------------------------------------------
def turned_and_written(self, q, k, v):
    out = torch.matmul(weights_of(q, k), v)
    out.unsqueeze_(2)
    out.view(out.size(0), -1)[:, ::2].mul_(3)
    return out


def turned_beside_view(self, q, k, v):
    out = torch.matmul(weights_of(q, k), v)
    part = out[:, :1]
    out.transpose_(1, 2)
    part.mul_(2)
    return out, part


def mask_turned_beside_row(self, q, k, v):
    hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
    row = hidden[0]
    hidden.t_()
    row[:] = False
    scores = q @ k.transpose(-2, -1) * SCALE
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


def bias_written_by_windows(self, q, k, v):
    bias = torch.zeros(q.shape[-2], k.shape[-2])
    bias.unfold(-1, 3, 3)[..., 0] = 2.0
    return (q @ k.transpose(-2, -1) * SCALE + bias.to(q.dtype)).softmax(-1) @ v


def all_dimensions_reversed(self, q, k, v):
    bias = torch.zeros(k.shape[-2], q.shape[-2], 1)
    bias.T[:, :, 1] = 2.0
    scores = q.T.permute(3, 2, 1, 0) @ k.transpose(-2, -1) * SCALE
    return (scores + bias.T.to(q.dtype)).softmax(-1) @ v


# -- routers and heads ----------------------------------------------------------------------------
def with_router(self, sizes):
    self.gate = nn.Linear(sizes["c"], 4, bias=False)
    self.experts = nn.Parameter(torch.randn(4, sizes["c"], sizes["c"]) / 8)


def router_top_k(self, x):
    tokens = x.flatten(0, 1)
    weights, chosen = self.gate(tokens).softmax(-1).topk(2, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    outputs = torch.einsum("nc,ecd->ned", tokens, self.experts)
    picked = outputs.gather(1, chosen.unsqueeze(-1).expand(-1, -1, outputs.size(-1)))
    return (weights.unsqueeze(-1) * picked).sum(1).view_as(x)


def router_dense(self, x):
    weights = self.gate(x).softmax(-1)
    return torch.einsum("bse,bsed->bsd", weights, torch.einsum("bsc,ecd->bsed", x, self.experts))


def router_matmul(self, x):
    outputs = torch.einsum("bsc,ecd->bsed", x, self.experts)
    return (self.gate(x).softmax(-1).unsqueeze(-2) @ outputs).squeeze(-2)


def expert_layers(self, x):
    hidden = torch.bmm(x.flatten(0, 1).expand(4, -1, -1), self.experts).relu()
    return torch.bmm(hidden, self.experts.transpose(1, 2)).mean(0)


def two_products(self, x):
    return F.relu(x @ self.experts[0]) @ self.experts[1]


def gated_unit(self, x):
    return (torch.sigmoid(x @ self.experts[0]) * (x @ self.experts[1])) @ self.experts[2]


def cross_entropy(self, x):
    logits = self.gate(x).flatten(0, 1)
    target = torch.arange(logits.size(0)) % 4
    return F.cross_entropy(logits, target)


def class_probabilities(self, x):
    return self.gate(x).softmax(-1), F.log_softmax(self.gate(x), dim=-1)


def contrastive(self, q, k, v):
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) / 0.1
    return -F.log_softmax(scores, -1).diagonal(dim1=-2, dim2=-1).mean(), v.sum()


def distillation(self, q, k, v):
    return F.kl_div(F.log_softmax(q @ k.mT, -1), weights_of(k, q), reduction="sum"), v.sum()


# -- softmax over something else ------------------------------------------------------------------
def softmax_of_key(self, q, k, v):
    context = k.softmax(dim=-2).transpose(-2, -1) @ v
    return q.softmax(dim=-1) @ context


def softmax_of_channels(self, q, k, v):
    return q.softmax(dim=-1) @ (k.transpose(-2, -1) @ v)


def softmax_over_queries(self, q, k, v):
    return (q @ k.transpose(-2, -1) * SCALE).softmax(dim=-2) @ v


def softmax_not_contracted(self, q, k, v):
    return weights_of(q, k).transpose(-2, -1) @ v


def softmax_over_heads(self, q, k, v):
    return (q @ k.transpose(-2, -1) * SCALE).softmax(dim=1) @ v


def softmax_over_all(self, q, k, v):
    scores = q @ k.transpose(-2, -1) * SCALE
    return scores.flatten(2).softmax(-1).view_as(scores) @ v


def softmax_partly_contracted(self, q, k, v):
    scores = torch.einsum("bhqd,bhkd->bhqk", q, torch.cat([k, -k], -2)) * SCALE
    weights = scores.softmax(-1).unflatten(-1, (2, -1))
    return torch.einsum("bhqtk,bhkd->bhtqd", weights, v)


def slots(self, q, k, v):
    weights = (q @ k.transpose(-2, -1) * SCALE).softmax(dim=-2) + 1e-6
    return (weights / weights.sum(dim=-1, keepdim=True)) @ v


def soft_argmax(self, heat):
    at = torch.arange(heat.size(-1), dtype=heat.dtype)
    return heat.softmax(-1) @ torch.stack([at, at * at], -1)


def softmax_pooling(self, x):
    return (x.softmax(dim=1) * x).sum(1)


def average_pooling(self, x):
    return F.adaptive_avg_pool1d(x.transpose(1, 2), 1).flatten(1).softmax(-1)


def sinkhorn(self, q, k, v):
    plan = q @ k.transpose(-2, -1) * SCALE
    for _ in range(2):
        plan = plan - plan.logsumexp(-1, keepdim=True)
        plan = plan - plan.logsumexp(-2, keepdim=True)
    return plan.exp() @ v


def with_dynamic_convolution(self, sizes):
    self.taps = nn.Linear(sizes["c"], 3 * sizes["h"])


def dynamic_convolution(self, x):
    batch, length, width = x.shape
    weights = self.taps(x).view(batch, length, 4, 1, 3).softmax(-1)
    windows = F.pad(x, (0, 0, 1, 1)).unfold(1, 3, 1).reshape(batch, length, 4, width // 4, 3)
    return (weights * windows).sum(-1).flatten(2)


def dynamic_convolution_matmul(self, x):
    batch, length, width = x.shape
    weights = self.taps(x).view(batch * length, 4, 1, 3).softmax(-1)
    windows = F.pad(x, (0, 0, 1, 1)).unfold(1, 3, 1).reshape(batch * length, 4, width // 4, 3)
    return (weights @ windows.transpose(-2, -1)).view(batch, length, width)


# -- chains of products ---------------------------------------------------------------------------
def product_chain(self, q, k, v):
    return (q @ k.transpose(-2, -1)) @ v


def product_chain_scaled(self, q, k, v):
    return (q @ k.transpose(-2, -1) / k.size(-2)) @ v


def linear_attention(self, q, k, v):
    q, k = F.elu(q) + 1, F.elu(k) + 1
    weights = q @ k.transpose(-2, -1)
    return (weights @ v) / weights.sum(-1, keepdim=True)


def linear_attention_associated(self, q, k, v):
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return (q @ (k.transpose(-2, -1) @ v)) / (q @ k.sum(-2).unsqueeze(-1))


def retention(self, q, k, v):
    step = torch.arange(q.size(-2))[:, None] - torch.arange(k.size(-2))[None, :]
    decay = torch.where(step >= 0, 0.9 ** step.clamp(min=0), 0.0).to(q.dtype)
    return (q @ k.transpose(-2, -1) * decay) @ v


# -- attention with a trap ------------------------------------------------------------------------
def weights_measured(self, q, k, v):
    weights = weights_of(q, k)
    entropy = -(weights * (weights + 1e-9).log()).sum(-1).mean()
    return weights @ v, entropy


def weights_select(self, q, k, v):
    weights = weights_of(q, k)
    best = weights.mean((1, 2)).topk(3, dim=-1).indices
    kept = torch.gather(v, 2, best[:, None, :, None].expand(-1, v.size(1), -1, v.size(3)))
    return weights @ v, kept


def weights_mutated_after(self, q, k, v):
    weights = weights_of(q, k)
    out = weights @ v
    weights.mul_(2.0)
    return out, weights


def weights_mutated_before(self, q, k, v):
    weights = weights_of(q, k)
    weights[..., 0] = 0.0
    return weights @ v


def weights_mutated_by_view(self, q, k, v):
    weights = weights_of(q, k)
    first = weights[:, :1]
    first.zero_()
    return weights @ v


def query_overwritten(self, q, k, v):
    q = q * 1.0
    scores = q @ k.transpose(-2, -1) * SCALE
    q.zero_()
    return scores.softmax(-1) @ v


def value_overwritten(self, q, k, v):
    v = v.clone()
    weights = weights_of(q, k)
    v.mul_(weights.sum(-1, keepdim=True) + 1.0)
    out = weights @ v
    v.zero_()
    return out, v


def inputs_overwritten(self, q, k, v):
    k.mul_(2.0)
    out = weights_of(q, k) @ v
    v.add_(1.0)
    return out


def weights_into_buffer(self, q, k, v):
    weights = weights_of(q, k)
    self.seen.copy_(weights.detach().mean((0, 2, 3)))
    return weights @ v


def with_seen(self, sizes):
    self.register_buffer("seen", torch.zeros(sizes["h"]))


def dead_softmax(self, q, k, v):
    (q @ k.transpose(-2, -1)).softmax(-1)
    return q + k + v


def dead_attention(self, q, k, v):
    weights_of(q, k) @ v
    return q * 2.0


def dead_beside_live(self, q, k, v):
    weights_of(k, q)
    return weights_of(q, k) @ v


def detached_weights(self, q, k, v):
    return weights_of(q, k).detach() @ v


def weights_without_grad(self, q, k, v):
    with torch.no_grad():
        weights = weights_of(q, k)
    return weights @ v


def detached_value(self, q, k, v):
    return weights_of(q, k) @ v.detach() + v


def hard_forward(self, q, k, v):
    weights = weights_of(q, k)
    hard = F.one_hot(weights.argmax(-1), k.size(-2)).to(weights.dtype)
    return (hard - weights.detach() + weights) @ v


def gumbel(self, q, k, v):
    return F.gumbel_softmax(q @ k.transpose(-2, -1) * SCALE, tau=1.0, dim=-1) @ v


def gumbel_hard(self, q, k, v):
    return F.gumbel_softmax(q @ k.transpose(-2, -1) * SCALE, hard=True) @ v


def noisy_scores(self, q, k, v):
    scores = q @ k.transpose(-2, -1) * SCALE
    return (scores + torch.randn_like(scores)).softmax(-1) @ v


def always_dropout(self, q, k, v):
    return F.dropout(weights_of(q, k), 0.3, training=True) @ v


def dropped_scores(self, q, k, v):
    scores = F.dropout(q @ k.transpose(-2, -1) * SCALE, 0.2, self.training)
    return scores.softmax(-1) @ v


# -- dtypes ---------------------------------------------------------------------------------------
def softmax_in_double(self, q, k, v):
    return (q @ k.transpose(-2, -1) * SCALE).softmax(-1, dtype=torch.float64).to(q.dtype) @ v


def softmax_in_half(self, q, k, v):
    return (q @ k.transpose(-2, -1) * SCALE).half().softmax(-1).to(q.dtype) @ v


def rounded_weights(self, q, k, v):
    return (weights_of(q, k) * 15).round() / 15 @ v


def integer_scores(self, q, k, v):
    scores = (q @ k.transpose(-2, -1) * SCALE).round().to(torch.int32)
    return scores.to(q.dtype).softmax(-1) @ v


def thresholded(self, q, k, v):
    weights = weights_of(q, k)
    return torch.where(weights > 0.05, weights, 0.0) @ v


def top_keys_only(self, q, k, v):
    scores = q @ k.transpose(-2, -1) * SCALE
    least = scores.topk(3, dim=-1).values[..., -1:]
    return scores.masked_fill(scores < least, -torch.inf).softmax(-1) @ v


# -- shifts that do not drop out, scores shared with something else -------------------------------
def one_beside_half_a_shift(self, q, k, v):
    scores = q @ k.transpose(-2, -1) * SCALE
    weights = torch.exp(scores - scores.amax(-1, keepdim=True) / 2)
    return (weights / (1 + weights.sum(-1, keepdim=True))) @ v


def score_beside_sum(self, q, k, v):
    scores = q @ k.transpose(-2, -1) * SCALE
    weights = scores.exp()
    return (weights / (weights.sum(-1, keepdim=True) + torch.exp(scores))) @ v


def sum_less_one(self, q, k, v):
    weights = (q @ k.transpose(-2, -1) * SCALE).exp()
    return (weights / (weights.sum(-1, keepdim=True) - 0.5)) @ v


def shifted_along_queries(self, q, k, v):
    scores = q @ k.transpose(-2, -1) * SCALE
    return (scores - scores.amax(-2, keepdim=True)).softmax(-1) @ v


def shifted_by_least(self, q, k, v):
    scores = q @ k.transpose(-2, -1) * SCALE
    return (scores + (-scores).amax(-1, keepdim=True)).softmax(-1) @ v


def shifted_sigmoid(self, q, k, v):
    scores = (q @ k.transpose(-2, -1) * SCALE) / 32
    return ((scores - scores.amax(-1, keepdim=True)) * 32).sigmoid() @ v


def shifted_then_clamped(self, q, k, v):
    scores = q @ k.transpose(-2, -1) * SCALE
    return (scores - scores.max()).clamp(min=-1.0).softmax(-1) @ v


def shifted_then_tripled(self, q, k, v):
    scores = q @ k.transpose(-2, -1) * SCALE
    return torch.softmax((scores - scores.amax(-1, keepdim=True)) ** 3, -1) @ v


def scores_classified(self, q, k, v):
    scores = q @ k.transpose(-2, -1) * SCALE
    return scores.softmax(-1) @ v, -scores.log_softmax(-1).diagonal(dim1=-2, dim2=-1).mean()


def scores_shared_and_measured(self, q, k, v):
    scores = q @ k.transpose(-2, -1) * SCALE
    other = (scores + 1.0).transpose(-2, -1).softmax(-1)
    return scores.softmax(-1) @ v, other @ q, other.topk(2, dim=-1).values.prod()


def row_of_triangle(self, q, k, v):
    return (q @ k.transpose(-2, -1) * SCALE).tril().softmax(-1)[:, :, 3:4] @ v


def rows_with_a_step(self, q, k, v):
    return (q @ k.transpose(-2, -1) * SCALE)[:, :, ::20].softmax(-1) @ v


def row_beside_rows(self, q, k, v):
    scores = q @ k.transpose(-2, -1) * SCALE
    return (scores - scores[:, :, :1]).softmax(-1) @ v


def with_mixer(self, sizes):
    self.mixer = nn.Parameter(torch.randn(sizes["h"], sizes["h"]))


def head_of_mixed(self, q, k, v):
    return torch.einsum("gh,bhqk->bgqk", self.mixer, weights_of(q, k))[:, 1] @ v[:, 1]


def with_branches(self, sizes):
    self.gate = nn.Conv1d(sizes["c"], 4 + sizes["c"], 1)
    self.branches = nn.Conv1d(sizes["c"], 4 * sizes["c"], 1)


def router_of_convolution(self, x):
    gate, shared = self.gate(x).split([4, x.size(1)], dim=1)
    branches = self.branches(x).unflatten(1, (4, -1))
    return (gate.softmax(1).unsqueeze(2) * branches).sum(1) + shared


def soft_argmax_of_convolution(self, x):
    heat = self.gate(x)[:, :4].softmax(-1)
    return (heat * torch.arange(x.size(-1), dtype=x.dtype)).sum(-1)


ROUTERS = [
    NearMiss("router, top k", router_top_k, "x: b s c", with_router),
    NearMiss("router, dense", router_dense, "x: b s c", with_router),
    NearMiss("router, matmul", router_matmul, "x: b s c", with_router),
    NearMiss("expert layers", expert_layers, "x: b s c", with_router),
    NearMiss("two products with ReLU", two_products, "x: b s c", with_router),
    NearMiss("gated unit", gated_unit, "x: b s c", with_router),
    NearMiss("cross-entropy", cross_entropy, "x: b s c", with_router),
    NearMiss("class probabilities", class_probabilities, "x: b s c", with_router),
    NearMiss("contrastive", contrastive),
    NearMiss("distillation", distillation),
]
AXES = [
    NearMiss("softmax of K", softmax_of_key),
    NearMiss("softmax over channels", softmax_of_channels),
    NearMiss("softmax over queries", softmax_over_queries),
    NearMiss("softmax not contracted", softmax_not_contracted),
    NearMiss("softmax over heads", softmax_over_heads),
    NearMiss("softmax over queries and keys", softmax_over_all),
    NearMiss("softmax partly contracted", softmax_partly_contracted, CROSS),
    NearMiss("slots", slots),
    NearMiss("soft argmax", soft_argmax, "heat: b h s"),
    NearMiss("softmax pooling", softmax_pooling, "x: b s c"),
    NearMiss("average pooling", average_pooling, "x: b s c"),
    NearMiss("Sinkhorn", sinkhorn),
    NearMiss("dynamic convolution", dynamic_convolution, "x: b s c", with_dynamic_convolution),
    NearMiss("dynamic convolution, matmul", dynamic_convolution_matmul, "x: b s c",
             with_dynamic_convolution),
]
CHAINS = [
    NearMiss("product chain", product_chain, expect="reassociable"),
    NearMiss("product chain, scaled", product_chain_scaled, expect="reassociable"),
    NearMiss("linear attention", linear_attention, expect="reassociable"),
    NearMiss("linear attention, associated", linear_attention_associated),
    NearMiss("retention", retention),
]
TRAPS = [
    NearMiss("weights measured", weights_measured, expect="unrewritten"),
    NearMiss("weights select", weights_select, expect="unrewritten"),
    NearMiss("weights mutated after", weights_mutated_after, expect="unrewritten",
             gradients=False),
    NearMiss("weights mutated before", weights_mutated_before, expect="any", gradients=False),
    NearMiss("weights mutated by a view", weights_mutated_by_view, expect="any",
             gradients=False),
    NearMiss("query overwritten", query_overwritten, expect="any", gradients=False),
    NearMiss("turned and written", turned_and_written, expect="any"),
    NearMiss("turned beside a view", turned_beside_view, expect="any"),
    NearMiss("mask turned beside a row", mask_turned_beside_row, expect="any"),
    NearMiss("bias written by windows", bias_written_by_windows, expect="any"),
    NearMiss("all dimensions reversed", all_dimensions_reversed, expect="any"),
    NearMiss("value overwritten", value_overwritten, expect="any", gradients=False),
    NearMiss("inputs overwritten", inputs_overwritten, expect="any", gradients=False),
    NearMiss("weights into a buffer", weights_into_buffer, setup=with_seen,
             expect="unrewritten"),
    NearMiss("dead softmax", dead_softmax),
    NearMiss("dead attention", dead_attention),
    NearMiss("dead beside live", dead_beside_live, expect="any"),
    NearMiss("weights detached", detached_weights, expect="any"),
    NearMiss("weights without grad", weights_without_grad, expect="any"),
    NearMiss("value detached", detached_value, expect="any"),
    NearMiss("hard forward", hard_forward, expect="unrewritten"),
    NearMiss("Gumbel", gumbel, expect="any"),
    NearMiss("Gumbel, hard", gumbel_hard, expect="any"),
    NearMiss("noise on the scores", noisy_scores, expect="any"),
    NearMiss("dropout that never ends", always_dropout, expect="any"),
    NearMiss("dropout on the scores", dropped_scores, expect="any"),
    NearMiss("softmax in float64", softmax_in_double, expect="any"),
    NearMiss("softmax in float16", softmax_in_half, expect="any"),
    NearMiss("weights rounded", rounded_weights, expect="any"),
    NearMiss("integer scores", integer_scores, expect="any"),
    NearMiss("weights over a threshold", thresholded, expect="any"),
    NearMiss("top keys only", top_keys_only, expect="any"),
]
SHIFTS = [
    NearMiss("one beside half a shift", one_beside_half_a_shift),
    NearMiss("a score beside the sum", score_beside_sum),
    NearMiss("sum less one", sum_less_one, expect="any"),
    NearMiss("shifted along queries", shifted_along_queries),
    NearMiss("shifted by the least", shifted_by_least),
    NearMiss("shifted sigmoid", shifted_sigmoid),
    NearMiss("shifted, then clamped", shifted_then_clamped),
    NearMiss("shifted, then cubed", shifted_then_tripled),
    NearMiss("scores classified", scores_classified, expect="unrewritten"),
    NearMiss("scores shared and measured", scores_shared_and_measured, expect="any"),
    NearMiss("row of a triangle", row_of_triangle),
    NearMiss("rows with a step", rows_with_a_step),
    NearMiss("a row beside all rows", row_beside_rows, expect="any"),
    NearMiss("head of mixed heads", head_of_mixed, setup=with_mixer),
    NearMiss("router of a convolution", router_of_convolution, "x: b c s", with_branches),
    NearMiss("soft argmax of a convolution", soft_argmax_of_convolution, "x: b c s",
             with_branches),
]
NEAR_MISSES = ROUTERS + AXES + CHAINS + TRAPS + SHIFTS
