"""Normalisers written out, and what happens to the weights before they meet the values.

Softmax by exponentials and sums, by log-sum-exp, over a temperature; sigmoid and ReLU; heads mixed
before or after; weights edited, averaged or returned; results of in-place ops and slice writes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.spellings.denominator_spellings import DENOMINATORS
from tests.spellings.program import CROSS, QKV, Spelling

SCALE = 0.25
KEYS = QKV + ", mask: keep b 1 1 s"


def scored(q, k):
    return q @ k.transpose(-2, -1) * SCALE


def by_softmax(self, q, k, v):
    return torch.softmax(scored(q, k), dim=-1) @ v


def by_softmax_masked(self, q, k, v, mask):
    return scored(q, k).masked_fill(~mask, -torch.inf).softmax(-1) @ v


# -- softmax in other words -----------------------------------------------------------------------
def log_sum_exp(self, q, k, v):
    scores = scored(q, k)
    return torch.exp(scores - torch.logsumexp(scores, dim=-1, keepdim=True)) @ v


def log_softmax_exp(self, q, k, v):
    return F.log_softmax(scored(q, k), dim=-1).exp() @ v


def exp_over_sum(self, q, k, v):
    weights = scored(q, k).exp()
    return (weights / weights.sum(-1, keepdim=True)) @ v


def exp_sum_after(self, q, k, v):
    weights = torch.exp(scored(q, k))
    return torch.matmul(weights, v) / torch.sum(weights, dim=-1).unsqueeze(-1)


def exp_times_reciprocal(self, q, k, v):
    scores = scored(q, k)
    weights = (scores - scores.max(dim=-1, keepdim=True)[0].detach()).exp()
    return (weights @ v) * weights.sum(-1, keepdim=True).reciprocal()


def exp_normalized(self, q, k, v):
    return F.normalize(scored(q, k).exp(), p=1, dim=-1) @ v


def sum_as_product_with_ones(self, q, k, v):
    weights = scored(q, k).exp()
    return (weights @ v) / (weights @ torch.ones_like(v[..., :1]))


def hand_written_masked(self, q, k, v, mask):
    scores = scored(q, k).masked_fill(~mask, -torch.inf)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return weights / weights.sum(-1, keepdim=True) @ v


def softmax_module(self, q, k, v):
    return self.softmax(scored(q, k)) @ v


def with_softmax(self, sizes):
    self.softmax = nn.Softmax(dim=-1)


def softmax_plus_one(self, q, k, v):
    scores = scored(q, k)
    weights = scores.exp()
    return (weights / (1 + weights.sum(-1, keepdim=True))) @ v


def softmax_with_zero_key(self, q, k, v):
    scores = F.pad(scored(q, k), (1, 0))
    return scores.softmax(-1)[..., 1:] @ v


def zero_key_appended(self, q, k, v):
    k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    return F.scaled_dot_product_attention(q, k, v, scale=SCALE)


# -- other normalisers ----------------------------------------------------------------------------
def sigmoid_biased(self, q, k, v):
    return torch.sigmoid(scored(q, k) - 2.0) @ v


def sigmoid_masked(self, q, k, v, mask):
    return torch.sigmoid(scored(q, k).masked_fill(~mask, -torch.inf)) @ v


def sigmoid_masked_after(self, q, k, v, mask):
    return (scored(q, k).sigmoid() * mask) @ v


def relu_squared(self, q, k, v):
    return (F.relu(scored(q, k)) ** 2 / k.size(-2)) @ v


def relu_squared_product(self, q, k, v):
    positive = scored(q, k).relu()
    return positive.mul(positive) @ v * (1 / k.size(-2))


def relu_normalised(self, q, k, v):
    weights = scored(q, k).relu()
    return (weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)) @ v


def relu_normalised_after(self, q, k, v):
    weights = scored(q, k).clamp_min(0)
    return (weights @ v) / weights.sum(-1, keepdim=True).clamp(min=1e-6)


# -- heads mixed ----------------------------------------------------------------------------------
def with_mixers(self, sizes):
    self.before = nn.Linear(sizes["h"], sizes["h"], bias=False)
    self.after = nn.Linear(sizes["h"], sizes["h"])


def talking_linear(self, q, k, v):
    scores = self.before(scored(q, k).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    weights = self.after(scores.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return weights @ v


def talking_einsum(self, q, k, v):
    scores = torch.einsum("gh,bhqk->bgqk", self.before.weight, scored(q, k))
    weights = torch.einsum("gh,bhqk->bgqk", self.after.weight, scores.softmax(-1))
    return (weights + self.after.bias.view(-1, 1, 1)) @ v


def talking_before(self, q, k, v):
    return torch.einsum("gh,bhqk->bgqk", self.before.weight, scored(q, k)).softmax(-1) @ v


def talking_before_conv(self, q, k, v):
    return F.conv2d(scored(q, k), self.before.weight[:, :, None, None]).softmax(-1) @ v


def talking_after(self, q, k, v):
    weights = scored(q, k).softmax(-1)
    return F.conv2d(weights, self.after.weight[:, :, None, None], self.after.bias) @ v


def talking_after_linear(self, q, k, v):
    return self.after(scored(q, k).softmax(-1).movedim(1, -1)).movedim(-1, 1) @ v


# -- weights edited -------------------------------------------------------------------------------
def with_edit(self, sizes):
    self.gamma = nn.Parameter(torch.randn(sizes["h"], 1, 1))
    self.beta = nn.Parameter(torch.randn(sizes["h"], 1, 1) / 8)


def edited_affine(self, q, k, v):
    return (scored(q, k).softmax(-1) * self.gamma + self.beta) @ v


def edited_affine_apart(self, q, k, v):
    out = F.scaled_dot_product_attention(q, k, v, scale=SCALE)
    return self.gamma * out + self.beta * v.sum(-2, keepdim=True)


def edited_identity(self, q, k, v):
    eye = torch.eye(q.size(-2), dtype=q.dtype)
    return (0.5 * scored(q, k).softmax(-1) + 0.5 * eye) @ v


def edited_identity_apart(self, q, k, v):
    return 0.5 * (scored(q, k).softmax(-1) @ v) + 0.5 * v


def renormalised(self, q, k, v):
    weights = scored(q, k).softmax(-1) + 1e-3
    return (weights / weights.sum(-1, keepdim=True)) @ v


def renormalised_after(self, q, k, v):
    weights = scored(q, k).softmax(-1).add(1e-3)
    return (weights @ v) / weights.sum(dim=-1, keepdim=True)


def gated_weights(self, q, k, v, gate):
    return (scored(q, k).softmax(-1) * gate.sigmoid()) @ v


def gated_values(self, q, k, v, gate):
    return scored(q, k).softmax(-1) @ (v * gate.sigmoid().transpose(-2, -1))


def head_mask(self, q, k, v):
    return (scored(q, k).softmax(-1) * self.gamma) @ v


def head_mask_after(self, q, k, v):
    return self.gamma * F.scaled_dot_product_attention(q, k, v, scale=SCALE)


# -- weights also wanted, in place, by slices -----------------------------------------------------
def mean_weights_returned(self, q, k, v):
    weights = scored(q, k).softmax(-1)
    return weights @ v, weights.mean(1)


def mean_weights_first(self, q, k, v):
    weights = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q * SCALE, k), -1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v), weights.sum(1) / q.size(1)


def scores_returned(self, q, k, v):
    scores = scored(q, k)
    return scores.softmax(-1) @ v, scores


def scores_returned_sdpa(self, q, k, v):
    return F.scaled_dot_product_attention(q, k, v, scale=SCALE), scored(q, k)


def in_place(self, q, k, v, mask):
    scores = q @ k.transpose(-2, -1)
    scores *= SCALE
    scores.masked_fill_(~mask, -torch.inf)
    return torch.softmax(scores, -1) @ v


def in_place_div_add(self, q, k, v, mask):
    scores = torch.matmul(q, k.mT)
    scores.div_(4.0)
    scores += torch.where(mask, 0.0, -torch.inf).to(q.dtype)
    return scores.softmax(-1) @ v


def by_slices(self, q, k, v):
    scores = q.new_zeros(q.size(0), q.size(1), q.size(2), k.size(2))
    scores[:, :, :, :] = q @ k.transpose(-2, -1)
    scores[..., :] *= SCALE
    return scores.softmax(-1) @ v


def by_head_slices(self, q, k, v):
    out = torch.empty_like(q)
    for head in range(q.size(1)):
        weights = (q[:, head] @ k[:, head].transpose(-2, -1) * SCALE).softmax(-1)
        out[:, head] = weights @ v[:, head]
    return out


def no_dropout_in_place(self, q, k, v):
    """timm's TNT."""
    return F.dropout(torch.softmax(scored(q, k), dim=-1), 0.0, self.training, inplace=True) @ v


def unsqueezed_in_place(self, q, k, v):
    out = torch.matmul(scored(q, k).softmax(-1), v)
    out.unsqueeze_(2)
    return torch.cat([out, out * 2], 2)


def transposed_in_place(self, q, k, v):
    out = torch.matmul(scored(q, k).softmax(-1), v)
    out.transpose_(1, 2)
    out = out.transpose(1, 2)
    return torch.stack([out, out * 2], 2)


def two_part_keys(self, q, k, v, k2, v2):
    scores = torch.cat([scored(q, k), scored(q, k2)], dim=-1)
    weights = scores.softmax(-1)
    return weights[..., : k.size(-2)] @ v + weights[..., k.size(-2):] @ v2


def concatenated_keys(self, q, k, v, k2, v2):
    return torch.softmax(scored(q, torch.cat([k, k2], -2)), -1) @ torch.cat([v, v2], -2)


def differential_heads(self, q, k, v):
    weights = scored(q, k).softmax(-1).unflatten(1, (2, 2))
    return (weights[:, :, 0] - 0.3 * weights[:, :, 1]) @ v[:, ::2]


def differential_heads_apart(self, q, k, v):
    value = v[:, ::2]
    first = F.scaled_dot_product_attention(q[:, ::2], k[:, ::2], value, scale=SCALE)
    return first - 0.3 * F.scaled_dot_product_attention(q[:, 1::2], k[:, 1::2], value, scale=SCALE)


def two_layers(self, q, k, v):
    out = scored(q, k).softmax(-1) @ v
    return scored(q + out, k).softmax(-1) @ v


def two_layers_sdpa(self, q, k, v):
    out = F.scaled_dot_product_attention(q, k, v, scale=SCALE)
    return F.scaled_dot_product_attention(q + out, k, v, scale=SCALE)


def shared_weights(self, q, k, v, v2):
    weights = scored(q, k).softmax(-1)
    return weights @ v, weights @ v2


def shared_weights_joined(self, q, k, v, v2):
    out = F.scaled_dot_product_attention(q, k, torch.cat([v, v2], -1), scale=SCALE)
    return out.split([v.size(-1), v2.size(-1)], dim=-1)


def _norm(name, first, second, inputs=QKV, setup=None, **more):
    return Spelling(name, first, second, inputs, setup, **more)


WRITTEN_OUT = [
    _norm("log-sum-exp", log_sum_exp, by_softmax),
    _norm("exp of log_softmax", log_softmax_exp, log_sum_exp, required=False),
    _norm("exp / sum", exp_over_sum, by_softmax),
    _norm("exp, sum after PV", exp_sum_after, by_softmax, CROSS),
    _norm("exp times reciprocal", exp_times_reciprocal, exp_over_sum, required=False),
    _norm("exp normalised by F.normalize", exp_normalized, exp_over_sum, required=False),
    _norm("sum as a product with ones", sum_as_product_with_ones, exp_sum_after, required=False),
    _norm("hand-written with mask", hand_written_masked, by_softmax_masked, KEYS),
    _norm("nn.Softmax", softmax_module, by_softmax, setup=with_softmax),
    _norm("softmax plus one", softmax_plus_one, softmax_with_zero_key),
    _norm("zero key appended", zero_key_appended, softmax_plus_one),
]
OTHERS = [
    _norm("sigmoid with bias", sigmoid_biased, sigmoid_biased, CROSS),
    _norm("sigmoid masked", sigmoid_masked, sigmoid_masked_after, KEYS),
    _norm("squared ReLU", relu_squared, relu_squared_product),
    _norm("ReLU normalised", relu_normalised, relu_normalised_after, required=False),
]
HEADS = [
    _norm("talking heads", talking_linear, talking_einsum, setup=with_mixers),
    _norm("talking heads before", talking_before, talking_before_conv, setup=with_mixers),
    _norm("talking heads after", talking_after, talking_after_linear, setup=with_mixers),
    _norm("differential heads", differential_heads, differential_heads_apart),
]
EDITED = [
    _norm("weights times and plus", edited_affine, edited_affine_apart, setup=with_edit),
    _norm("weights and identity", edited_identity, edited_identity_apart),
    _norm("weights renormalised", renormalised, renormalised_after),
    _norm("weights gated per key", gated_weights, gated_values, QKV + ", gate: b h 1 s"),
    _norm("weights times a head mask", head_mask, head_mask_after, setup=with_edit),
]
AROUND = [
    _norm("mean weights returned", mean_weights_returned, mean_weights_first),
    _norm("scores returned", scores_returned, scores_returned_sdpa),
    _norm("in place", in_place, in_place_div_add, KEYS),
    _norm("scores written by slices", by_slices, by_softmax),
    _norm("head by head into slices", by_head_slices, by_softmax, required=False),
    _norm("result turned in place", unsqueezed_in_place, transposed_in_place),
    _norm("dropout of nothing in place", no_dropout_in_place, by_softmax),
    _norm("keys in two parts", two_part_keys, concatenated_keys,
          QKV + ", k2: b h k d, v2: b h k d", required=False),
    _norm("two layers", two_layers, two_layers_sdpa),
    _norm("one map, two values", shared_weights, shared_weights_joined,
          QKV + ", v2: b h s d", required=False),
]
NORMALISERS = WRITTEN_OUT + DENOMINATORS + OTHERS + HEADS + EDITED + AROUND
