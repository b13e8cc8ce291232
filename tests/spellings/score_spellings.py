"""Scores in every form: operand order, rank, scale, added terms, scores that are no dot product.

Grouped heads, casts, cross attention and unusual sizes are here as well. Each pair is one formula
written twice.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.spellings.program import CROSS, QKV, Spelling

SCALE = 0.25


def attend(scores, v):
    return torch.softmax(scores, dim=-1) @ v


def plain(self, q, k, v):
    return attend(q @ k.transpose(-2, -1) * SCALE, v)


def by_sdpa(self, q, k, v):
    return F.scaled_dot_product_attention(q, k, v, scale=SCALE)


# -- operand order --------------------------------------------------------------------------------
def key_times_query(self, q, k, v):
    return attend((k @ q.transpose(-2, -1)).transpose(-2, -1) * SCALE, v)


def weights_on_the_right(self, q, k, v):
    weights = (q @ k.transpose(-2, -1) * SCALE).softmax(-1)
    return (v.transpose(-2, -1) @ weights.transpose(-2, -1)).transpose(-2, -1)


def softmax_over_rows(self, q, k, v):
    weights = (k @ q.transpose(-2, -1) * SCALE).softmax(dim=-2)
    return weights.transpose(-2, -1) @ v


def channels_first(self, q, k, v):
    weights = torch.softmax(torch.einsum("bcq,bck->bqk", q, k) * SCALE, dim=2)
    return torch.bmm(v, weights.permute(0, 2, 1))


def channels_first_sdpa(self, q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=SCALE).transpose(1, 2)


def keys_in_the_middle(self, q, k, v):
    weights = torch.softmax(torch.einsum("bhqd,bhkd->bkhq", q, k) * SCALE, dim=1)
    return torch.einsum("bkhq,bhkd->bhqd", weights, v)


def product_and_sum(self, q, k, v):
    scores = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1) * SCALE
    return (scores.softmax(-1).unsqueeze(-1) * v.unsqueeze(-3)).sum(-2)


# -- rank, projections, one input for all ---------------------------------------------------------
def rank_two(self, q, k, v):
    return attend(q @ k.t() * SCALE, v)


def rank_two_mm(self, q, k, v):
    return torch.mm(torch.softmax(torch.mm(q, k.T) / 4, 1), v)


def with_projections(self, sizes):
    self.qkv = nn.Linear(sizes["c"], 3 * sizes["c"])
    self.out = nn.Linear(sizes["c"], sizes["c"])


def projected(self, x):
    batch, length, width = x.shape
    q, k, v = self.qkv(x).reshape(batch, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
    out = attend(q @ k.transpose(-2, -1) * SCALE, v)
    return self.out(out.transpose(1, 2).reshape(batch, length, width))


def projected_apart(self, x):
    q, k, v = (F.linear(x, w, b).unflatten(-1, (4, -1)) for w, b in zip(
        self.qkv.weight.chunk(3), self.qkv.bias.chunk(3), strict=True))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(SCALE).softmax(-1)
    return self.out(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


def one_input(self, x):
    return attend(x @ x.transpose(-2, -1) * SCALE, x)


def one_input_einsum(self, x):
    weights = (torch.einsum("bqd,bkd->bqk", x, x) * SCALE).softmax(-1)
    return torch.einsum("bqk,bkd->bqd", weights, x)


def fold_heads(self, q, k, v):
    fq, fk, fv = (x.reshape(-1, x.size(-2), x.size(-1)) for x in (q, k, v))
    out = torch.bmm(torch.bmm(fq, fk.transpose(1, 2)).mul(SCALE).softmax(-1), fv)
    return out.view(q.shape)


# -- scale ----------------------------------------------------------------------------------------
def scale_on_key(self, q, k, v):
    return attend(q @ (k * SCALE).transpose(-2, -1), v)


def scale_in_two_steps(self, q, k, v):
    return attend((q / 2) @ k.transpose(-2, -1) / 2.0, v)


def with_head_scale(self, sizes):
    self.log_scale = nn.Parameter(torch.randn(sizes["h"], 1, 1))


def head_scale(self, q, k, v):
    return attend(q @ k.transpose(-2, -1) * self.log_scale.clamp(max=2.0).exp(), v)


def head_scale_on_query(self, q, k, v):
    return attend((q * self.log_scale.clamp(max=2.0).exp()) @ k.mT, v)


def scale_after_mask(self, q, k, v, mask):
    return attend((q @ k.transpose(-2, -1) + mask) * SCALE, v)


def scale_before_mask(self, q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask / 4, scale=SCALE)


def scale_of_length(self, q, k, v):
    return attend(q @ k.transpose(-2, -1) * (math.log(k.size(-2)) / 4), v)


def scale_of_length_on_query(self, q, k, v):
    return attend((q * (math.log(q.size(-2)) / 4)) @ k.mT, v)


def temperature_per_query(self, q, k, v, t):
    return attend(q @ k.transpose(-2, -1) * t.sigmoid(), v)


def temperature_on_query(self, q, k, v, t):
    return attend((q * t.sigmoid()) @ k.transpose(-2, -1), v)


# -- added terms ----------------------------------------------------------------------------------
def with_two_tables(self, sizes):
    self.first = nn.Parameter(torch.randn(sizes["h"], sizes["s"], sizes["s"]))
    self.register_buffer("second", torch.randn(sizes["s"], sizes["s"]))


def several_terms(self, q, k, v, mask):
    scores = q @ k.transpose(-2, -1) * SCALE + self.first
    return attend(scores + self.second.to(q.dtype) + mask, v)


def several_terms_summed(self, q, k, v, mask):
    bias = self.first[None] + self.second.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias + mask, scale=SCALE)


def with_relative_keys(self, sizes):
    self.rel = nn.Parameter(torch.randn(sizes["s"], sizes["s"], sizes["d"]))


def relative_keys(self, q, k, v):
    term = torch.einsum("bhqd,qkd->bhqk", q, self.rel)
    return attend((q @ k.transpose(-2, -1) + term) * SCALE, v)


def relative_keys_matmul(self, q, k, v):
    term = torch.matmul(q.unsqueeze(-2), self.rel.transpose(-2, -1)).squeeze(-2)
    return attend(q @ k.mT * SCALE + SCALE * term, v)


def subtracted_term(self, q, k, v, bias):
    return attend(q @ k.transpose(-2, -1) * SCALE - bias, v)


def negated_term(self, q, k, v, bias):
    return attend(torch.add(q @ k.transpose(-2, -1) * SCALE, bias, alpha=-1), v)


def softcap_then_mask(self, q, k, v, mask):
    scores = torch.tanh(q @ k.transpose(-2, -1) * SCALE / 3.0) * 3.0 + mask
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def softcap_divided(self, q, k, v, mask):
    scores = (q @ k.transpose(-2, -1) * SCALE).float()
    scores = 3.0 * (scores / 3.0).tanh()
    return (scores + mask).softmax(-1).to(q.dtype) @ v


def gated_scores(self, q, k, v, gate):
    return attend(q @ k.transpose(-2, -1) * SCALE * gate.sigmoid(), v)


def gated_scores_first(self, q, k, v, gate):
    return attend(torch.sigmoid(gate) * (q @ k.mT / 4), v)


# -- scores that are no dot product ---------------------------------------------------------------
def cosine_normalize(self, q, k, v):
    return attend(F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * 10.0, v)


def cosine_by_norm(self, q, k, v):
    q = q / q.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    k = k / k.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return attend(10.0 * torch.einsum("bhqd,bhkd->bhqk", q, k), v)


def cosine_divided_after(self, q, k, v):
    norms = q.norm(dim=-1)[..., :, None] * k.norm(dim=-1)[..., None, :]
    return attend(10.0 * (q @ k.mT) / norms.clamp_min(1e-12), v)


def distance_expanded(self, q, k, v):
    square = (q * q).sum(-1, keepdim=True) + (k * k).sum(-1).unsqueeze(-2)
    return attend(-(square - 2 * q @ k.transpose(-2, -1)) / 8.0, v)


def distance_difference(self, q, k, v):
    step = q.unsqueeze(-2) - k.unsqueeze(-3)
    return attend(-(step**2).sum(-1) / 8.0, v)


def distance_pow_sum(self, q, k, v):
    return attend((q[..., :, None, :] - k[..., None, :, :]).pow(2).sum(dim=-1) * -0.125, v)


def distance_cdist(self, q, k, v):
    return attend((-torch.cdist(q.float(), k.float()) ** 2 / 8.0).to(q.dtype), v)


def distance_cdist_exact(self, q, k, v):
    far = torch.cdist(q.float(), k.float(), compute_mode="donot_use_mm_for_euclid_dist")
    return attend((-far.square() / 8.0).to(q.dtype), v)


def key_norm_only(self, q, k, v):
    scores = q @ k.transpose(-2, -1) / 4.0 - k.pow(2).sum(-1)[..., None, :] / 8.0
    return attend(scores, v)


def with_additive(self, sizes):
    self.energy = nn.Linear(sizes["d"], 1, bias=False)


def additive(self, q, k, v):
    return attend(self.energy(torch.tanh(q.unsqueeze(-2) + k.unsqueeze(-3))).squeeze(-1), v)


def additive_einsum(self, q, k, v):
    hidden = torch.tanh(q[:, :, :, None] + k[:, :, None])
    return attend(torch.einsum("bhqkd,d->bhqk", hidden, self.energy.weight[0]), v)


def with_pooling(self, sizes):
    self.logit = nn.Linear(sizes["c"], 1)


def key_only_logits(self, x):
    weights = self.logit(x).transpose(1, 2).softmax(-1)
    return weights @ x


def key_only_softmax_rows(self, x):
    weights = torch.softmax(self.logit(x), dim=1)
    return weights.transpose(1, 2) @ x


def with_learned_query(self, sizes):
    self.query = nn.Parameter(torch.randn(3, sizes["c"]))


def learned_query(self, x):
    return attend(self.query @ x.transpose(-2, -1) / 8.0, x)


def learned_query_sdpa(self, x):
    query = self.query.expand(x.size(0), -1, -1)
    return F.scaled_dot_product_attention(query, x, x, scale=0.125)


# -- casts, cross attention, sizes, grouped heads -------------------------------------------------
def wholly_upcast(self, q, k, v):
    out = attend(q.float() @ k.float().transpose(-2, -1) * SCALE, v.float())
    return out.to(q.dtype)


def wholly_upcast_sdpa(self, q, k, v):
    out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), scale=SCALE)
    return out.type_as(q)


def scores_upcast(self, q, k, v):
    scores = torch.matmul(q, k.transpose(-1, -2)).to(torch.float32) * SCALE
    return scores.softmax(-1).to(v.dtype) @ v


def softmax_dtype(self, q, k, v):
    weights = F.softmax(q @ k.transpose(-1, -2) * SCALE, -1, dtype=torch.float32)
    return weights.to(v) @ v


def expanded_heads(self, q, k, v):
    k = k.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2)
    v = v[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2)
    return attend(q @ k.transpose(-2, -1) * SCALE, v)


def multi_query(self, q, k, v):
    return attend(q @ k.transpose(-2, -1) * SCALE, v)


def multi_query_expand(self, q, k, v):
    k, v = (x.expand(-1, q.size(1), -1, -1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=SCALE)


def enabled_groups(self, q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=SCALE)


def shared_everywhere(self, q, k, v):
    weights = torch.einsum("bhqd,bkd->bhqk", q, k).mul(SCALE).softmax(-1)
    return torch.einsum("bhqk,bkd->bhqd", weights, v)


def shared_unsqueezed(self, q, k, v):
    k, v = k.unsqueeze(1), v.unsqueeze(1)
    return attend(q @ k.transpose(-2, -1) * SCALE, v)


def _score(name, first, second, inputs=QKV, setup=None, **more):
    return Spelling(name, first, second, inputs, setup, **more)


GROUPED = "q: b h s d, k: b g s d, v: b g s d"
MULTI_QUERY = "q: b h s d, k: b 1 s d, v: b 1 s d"
ORDERS = [
    _score("(K Q^T)^T", key_times_query, plain),
    _score("weights on the right", weights_on_the_right, by_sdpa),
    _score("softmax over rows of K Q^T", softmax_over_rows, key_times_query),
    _score("channels first", channels_first, channels_first_sdpa, "q: b d q, k: b d k, v: b d k"),
    _score("keys in the middle", keys_in_the_middle, plain, CROSS),
    _score("products and sums", product_and_sum, plain, CROSS, required=False),
]
RANKS = [
    _score("rank 2", rank_two, rank_two_mm, "q: s d, k: s d, v: s d"),
    _score("rank 3", plain, by_sdpa, "q: b q d, k: b k d, v: b k d"),
    _score("rank 4 folded", fold_heads, by_sdpa),
    _score("rank 5", plain, by_sdpa, "q: b w h s d, k: b w h s d, v: b w h s d"),
    _score("rank 6", plain, by_sdpa, "q: b w g h s d, k: b w g h s d, v: b w g h s d"),
    _score("projections", projected, projected_apart, "x: b s c", with_projections),
    _score("one input for all", one_input, one_input_einsum, "x: b s d"),
]
SCALES = [
    _score("scale on the key", scale_on_key, by_sdpa),
    _score("scale in two steps", scale_in_two_steps, plain),
    _score("scale per head", head_scale, head_scale_on_query, setup=with_head_scale),
    _score("scale after the mask", scale_after_mask, scale_before_mask, QKV + ", mask: b 1 s s"),
    _score("scale from the length", scale_of_length, scale_of_length_on_query),
    _score("temperature per query", temperature_per_query, temperature_on_query,
           QKV + ", t: b 1 s 1"),
]
TERMS = [
    _score("several added terms", several_terms, several_terms_summed, QKV + ", mask: add b 1 1 s",
           with_two_tables, moving="b"),
    _score("relative keys", relative_keys, relative_keys_matmul, setup=with_relative_keys,
           moving="b"),
    _score("subtracted term", subtracted_term, negated_term, QKV + ", bias: h s s"),
    _score("softcap then mask", softcap_then_mask, softcap_divided, QKV + ", mask: add b 1 1 s"),
    _score("scores times a gate", gated_scores, gated_scores_first, QKV + ", gate: b h s s"),
]
FORMS = [
    _score("cosine", cosine_normalize, cosine_by_norm),
    _score("cosine divided after", cosine_divided_after, cosine_normalize),
    _score("squared distance expanded / difference", distance_expanded, distance_difference, CROSS),
    _score("squared distance pow / cdist", distance_pow_sum, distance_cdist, CROSS),
    _score("squared distance, exact cdist", distance_cdist_exact, distance_expanded, CROSS),
    _score("dot product less the key's norm", key_norm_only, distance_expanded),
    _score("additive (tanh)", additive, additive_einsum, CROSS, with_additive),
    _score("key-only logits", key_only_logits, key_only_softmax_rows, "x: b s c", with_pooling),
    _score("learned queries", learned_query, learned_query_sdpa, "x: b s c", with_learned_query),
]
SHAPES = [
    _score("wholly in float32", wholly_upcast, wholly_upcast_sdpa),
    _score("scores in float32", scores_upcast, softmax_dtype),
    _score("cross attention", plain, by_sdpa, CROSS),
    _score("length equals heads", plain, by_sdpa, sizes={"s": 4}, moving="b"),
    _score("all sizes equal", plain, key_times_query, sizes={"s": 4, "b": 4, "d": 4}, moving=""),
    _score("value wider than key", plain, by_sdpa, "q: b h q d, k: b h k d, v: b h k e"),
    _score("one query", plain, by_sdpa, "q: b h 1 d, k: b h k d, v: b h k d"),
    _score("one key", plain, by_sdpa, "q: b h q d, k: b h 1 d, v: b h 1 d"),
    _score("GQA by expand", expanded_heads, enabled_groups, GROUPED),
    _score("multi-query by broadcasting", multi_query, multi_query_expand, MULTI_QUERY),
    _score("keys without a head axis", shared_everywhere, shared_unsqueezed,
           "q: b h s d, k: b s d, v: b s d"),
]
SCORES = ORDERS + RANKS + SCALES + TERMS + FORMS + SHAPES
