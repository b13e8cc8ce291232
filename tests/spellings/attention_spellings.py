"""The spellings of the peers table (reference/peers.md 0.1), each beside a second way to write it.

`TABLE` holds all of them by name: 39 written out by hand and 3 (`SDPA_ROWS`) that already call
F.scaled_dot_product_attention. Inductor's fuse_attention rewrites 10 of the 39. Shapes follow
`program.SIZES`: b batch, h heads, s length, d head_dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.spellings.program import QKV, Spelling

SCALE = 0.25
MASKED = QKV + ", mask: {} b 1 1 s"
GROUPED = "q: b h s d, k: b g s d, v: b g s d"


# -- scale and additive mask ----------------------------------------------------------------------
def scale_div(self, q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.size(-1)), dim=-1) @ v


def scale_mul(self, q, k, v):
    scores = torch.matmul(q, k.transpose(2, 3)) * SCALE
    return torch.matmul(F.softmax(scores, dim=-1), v)


def scale_div_add(self, q, k, v, mask):
    return torch.softmax(q @ k.transpose(-2, -1) / 4.0 + mask, dim=-1) @ v


def scale_mul_add(self, q, k, v, mask):
    scores = torch.matmul(q, k.mT) * SCALE
    scores = scores + mask
    return torch.matmul(scores.softmax(-1), v)


def scaled_query(self, q, k, v):
    return ((q * SCALE) @ k.transpose(-2, -1)).softmax(-1) @ v


def scaled_both(self, q, k, v):
    return ((q * SCALE**0.5) @ (k * SCALE**0.5).transpose(-2, -1)).softmax(-1) @ v


def no_scale(self, q, k, v):
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v


def sdpa_unit_scale(self, q, k, v):
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)


def with_learned_scale(self, sizes):
    self.scale = nn.Parameter(torch.tensor(0.3))


def learned_scale(self, q, k, v):
    return (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v


def learned_scale_on_query(self, q, k, v):
    return ((self.scale * q) @ k.transpose(-2, -1)).softmax(-1) @ v


# -- boolean masks, inline causal, HF's own -------------------------------------------------------
def where_mul(self, q, k, v, mask):
    scores = q @ k.transpose(-2, -1) * SCALE
    return torch.where(mask, scores, -math.inf).softmax(-1) @ v


def where_div(self, q, k, v, mask):
    scores = q @ k.transpose(-2, -1) / 4.0
    least = torch.full([], torch.finfo(scores.dtype).min, dtype=scores.dtype)
    return torch.where(mask, scores, least).softmax(-1) @ v


def masked_fill_mul(self, q, k, v, mask):
    scores = q @ k.transpose(-2, -1) * SCALE
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v


def masked_fill_div(self, q, k, v, mask):
    scores = (q @ k.transpose(-2, -1)).div(4.0)
    return scores.masked_fill(mask == 0, float("-inf")).softmax(-1) @ v


def sdpa_keep(self, q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def triu_causal(self, q, k, v):
    length = q.size(-2)
    scores = q @ k.transpose(-2, -1) * SCALE
    scores = scores + torch.triu(torch.full((length, length), -math.inf), diagonal=1).to(q.dtype)
    return scores.softmax(-1) @ v


def sdpa_causal(self, q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def hf_eager(self, q, k, v, mask):
    weights = torch.matmul(q, k.transpose(2, 3)) * SCALE
    weights = weights + mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = nn.functional.dropout(weights, p=0.0, training=self.training)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


def hf_eager_upcast(self, q, k, v, mask):
    weights = (torch.matmul(q, k.transpose(2, 3)) * SCALE + mask).float().softmax(-1).type_as(q)
    return torch.matmul(weights, v).permute(0, 2, 1, 3)


def hf_eager_unmasked(self, q, k, v):
    weights = torch.matmul(q, k.transpose(2, 3)) * SCALE
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


def hf_eager_unmasked_sdpa(self, q, k, v):
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


# -- grouped heads --------------------------------------------------------------------------------
def repeat_kv(x, times):
    batch, heads, length, head_dim = x.shape
    x = x[:, :, None, :, :].expand(batch, heads, times, length, head_dim)
    return x.reshape(batch, heads * times, length, head_dim)


def gqa_repeat_kv(self, q, k, v):
    k, v = repeat_kv(k, 2), repeat_kv(v, 2)
    return (q @ k.transpose(-2, -1) / 4.0).softmax(-1) @ v


def gqa_repeat_interleave(self, q, k, v):
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    return (q @ k.transpose(-2, -1) / 4.0).softmax(-1) @ v


def gqa_enable(self, q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def gqa_unflatten(self, q, k, v):
    q = q.unflatten(1, (2, 2))
    weights = (q @ k.unsqueeze(2).transpose(-2, -1) / 4.0).softmax(-1)
    return (weights @ v.unsqueeze(2)).flatten(1, 2)


# -- contractions ---------------------------------------------------------------------------------
def einsum_bhqd(self, q, k, v):
    weights = (torch.einsum("bhqd,bhkd->bhqk", q, k) * SCALE).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


def einsum_bshd(self, q, k, v):
    weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) * SCALE, dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def bshd_sdpa(self, q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def baddbmm_scores(self, q, k, v, bias):
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), beta=1.0, alpha=SCALE)
    return torch.bmm(scores.softmax(-1), v)


def bmm_bias(self, q, k, v, bias):
    return torch.bmm((torch.bmm(q, k.transpose(1, 2)) * SCALE + bias).softmax(-1), v)


def bmm_3d(self, q, k, v):
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) * SCALE, -1), v)


def baddbmm_empty(self, q, k, v):
    empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
    scores = torch.baddbmm(empty, q, k.transpose(1, 2), beta=0, alpha=SCALE)
    return torch.bmm(scores.softmax(-1), v)


def no_batch_3d(self, q, k, v):
    return (q @ k.transpose(-2, -1) * SCALE).softmax(-1) @ v


def no_batch_einsum(self, q, k, v):
    return torch.einsum("hqk,hkd->hqd", (torch.einsum("hqd,hkd->hqk", q, k) / 4).softmax(2), v)


# -- score modifications and biases ---------------------------------------------------------------
def softcap(self, q, k, v):
    scores = q @ k.transpose(-2, -1) * SCALE
    scores = torch.tanh(scores / 2.0) * 2.0
    return scores.softmax(-1) @ v


def softcap_folded(self, q, k, v):
    return (2.0 * torch.tanh(q @ k.transpose(-2, -1) * (SCALE / 2.0))).softmax(-1) @ v


def with_slopes(self, sizes):
    heads = sizes["h"]
    self.register_buffer("slopes", 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads))


def alibi(self, q, k, v):
    at = torch.arange(q.size(-2))
    bias = self.slopes[:, None, None] * (at[None, :] - at[:, None])
    return (q @ k.transpose(-2, -1) * SCALE + bias.to(q.dtype)).softmax(-1) @ v


def alibi_row(self, q, k, v):
    at = torch.arange(k.size(-2)).view(1, 1, -1) - torch.arange(q.size(-2)).view(1, -1, 1)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * SCALE
    return (scores + (self.slopes.view(-1, 1, 1) * at).to(q.dtype)).softmax(-1) @ v


def with_distance_table(self, sizes):
    self.table = nn.Parameter(torch.randn(2 * sizes["s"] - 1, sizes["h"]))
    at = torch.arange(sizes["s"])
    self.register_buffer("index", at[:, None] - at[None, :] + sizes["s"] - 1)


def relative_position_bias(self, q, k, v):
    bias = self.table[self.index].permute(2, 0, 1)
    return (q @ k.transpose(-2, -1) * SCALE + bias).softmax(-1) @ v


def relative_position_embedding(self, q, k, v):
    bias = F.embedding(self.index.flatten(), self.table).view(*self.index.shape, -1)
    bias = bias.movedim(-1, 0).unsqueeze(0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def with_t5_table(self, sizes):
    self.buckets = nn.Embedding(8, sizes["h"])


def t5_buckets(query_length, key_length):
    distance = torch.arange(key_length)[None, :] - torch.arange(query_length)[:, None]
    bucket = (distance > 0).long() * 4
    distance = distance.abs()
    far = 2 + (torch.log(distance.float() / 2) / math.log(8.0) * 2).long()
    far = torch.min(far, torch.full_like(far, 3))
    return bucket + torch.where(distance < 2, distance, far)


def t5_bias(self, q, k, v):
    scores = torch.matmul(q, k.transpose(3, 2))
    bias = self.buckets(t5_buckets(q.size(2), k.size(2))).permute([2, 0, 1]).unsqueeze(0)
    scores += bias
    return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(scores), v)


def t5_bias_sdpa(self, q, k, v):
    bias = self.buckets(t5_buckets(q.size(2), k.size(2))).permute(2, 0, 1)[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)


def with_swin_window(self, sizes):
    side, windows = 3, sizes["w"]
    self.table = nn.Parameter(torch.randn((2 * side - 1) ** 2, sizes["h"]))
    at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"))
    step = (at.flatten(1)[:, :, None] - at.flatten(1)[:, None, :]).permute(1, 2, 0) + side - 1
    self.register_buffer("index", step[..., 0] * (2 * side - 1) + step[..., 1])
    region = torch.randint(0, 2, (windows, side * side))
    region[0] = 0
    shift = (region[:, None, :] != region[:, :, None]).float() * -100.0
    self.register_buffer("shift", shift)


def swin_bias(self, q, k, v):
    area = q.size(-2)
    scores = (q * SCALE) @ k.transpose(-2, -1)
    bias = self.table[self.index.view(-1)].view(area, area, -1).permute(2, 0, 1).contiguous()
    return (scores + bias.unsqueeze(0)).softmax(-1) @ v


def swin_bias_sdpa(self, q, k, v):
    bias = self.table[self.index].permute(2, 0, 1).unsqueeze(0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=SCALE)


def swin_shifted(self, q, k, v):
    folded, heads, area, _ = q.shape
    windows = self.shift.size(0)
    scores = (q * SCALE) @ k.transpose(-2, -1)
    bias = self.table[self.index.view(-1)].view(area, area, -1).permute(2, 0, 1).contiguous()
    scores = scores + bias.unsqueeze(0)
    scores = scores.view(folded // windows, windows, heads, area, area)
    scores = scores + self.shift.unsqueeze(1).unsqueeze(0).to(scores.dtype)
    return scores.view(-1, heads, area, area).softmax(-1) @ v


def swin_shifted_sdpa(self, q, k, v):
    bias = self.table[self.index].permute(2, 0, 1)
    both = bias.unsqueeze(0) + self.shift.unsqueeze(1).to(bias.dtype)
    both = both.repeat(q.size(0) // self.shift.size(0), 1, 1, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=both, scale=SCALE)


# -- other normalisers ----------------------------------------------------------------------------
def with_sinks(self, sizes):
    self.sinks = nn.Parameter(torch.randn(sizes["h"]))


def sinks(self, q, k, v):
    scores = q @ k.transpose(-2, -1) * SCALE
    sink = self.sinks.reshape(1, -1, 1, 1).expand(scores.size(0), -1, scores.size(-2), -1)
    combined = torch.cat([scores, sink], dim=-1)
    combined = combined - combined.max(dim=-1, keepdim=True).values
    return F.softmax(combined, dim=-1)[..., :-1] @ v


def sinks_as_denominator(self, q, k, v):
    scores = q @ k.transpose(-2, -1) * SCALE
    row = torch.logsumexp(scores, dim=-1, keepdim=True)
    return (scores.softmax(-1) @ v) * torch.sigmoid(row - self.sinks.view(-1, 1, 1))


def with_differential(self, sizes):
    self.weight = nn.Parameter(torch.tensor(0.4))


def differential(self, q, k, v, q2, k2):
    first = (q @ k.transpose(-2, -1) * SCALE).softmax(-1)
    second = (q2 @ k2.transpose(-2, -1) * SCALE).softmax(-1)
    return (first - self.weight * second) @ v


def differential_apart(self, q, k, v, q2, k2):
    first = F.scaled_dot_product_attention(q, k, v)
    return first - self.weight * F.scaled_dot_product_attention(q2, k2, v)


def sigmoid_attention(self, q, k, v):
    return torch.sigmoid(q @ k.transpose(-2, -1) * SCALE - 2.0) @ v


def sigmoid_einsum(self, q, k, v):
    weights = F.sigmoid(torch.einsum("bhqd,bhkd->bhqk", q, k).div(4.0).add(-2.0))
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


def relu_attention(self, q, k, v):
    return F.relu(q @ k.transpose(-2, -1) * SCALE) / k.size(-2) @ v


def relu_scaled(self, q, k, v):
    return (torch.relu(torch.matmul(q * SCALE, k.mT)) * (1.0 / k.size(-2))) @ v


def divide_after(self, q, k, v):
    scores = q @ k.transpose(-2, -1) * SCALE
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights @ v) / weights.sum(-1, keepdim=True)


def max_subtract(self, q, k, v):
    scores = q @ k.transpose(-2, -1) / 4.0
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    return (weights / weights.sum(dim=-1, keepdim=True)) @ v


def weights_returned(self, q, k, v):
    weights = (q @ k.transpose(-2, -1) / 4.0).softmax(-1)
    return weights @ v, weights


def weights_returned_einsum(self, q, k, v):
    weights = torch.einsum("bhqd,bhkd->bhqk", q, k).mul(SCALE).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v), weights


def dropout(self, q, k, v):
    weights = (q @ k.transpose(-2, -1) / 4.0).softmax(-1)
    return F.dropout(weights, 0.1, self.training) @ v


def with_dropout(self, sizes):
    self.drop = nn.Dropout(0.1)


def dropout_module(self, q, k, v):
    weights = self.drop(torch.softmax(torch.matmul(q, k.mT) / 4.0, dim=-1))
    return torch.matmul(weights, v)


# -- layouts --------------------------------------------------------------------------------------
def windows_5d(self, q, k, v):
    return (q @ k.transpose(-2, -1) / 4.0).softmax(-1) @ v


def windows_folded(self, q, k, v):
    out = F.scaled_dot_product_attention(*(x.flatten(0, 1) for x in (q, k, v)))
    return out.unflatten(0, q.shape[:2])


def bshd_inputs(self, q, k, v):
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = (q @ k.transpose(-2, -1) / 4.0).softmax(-1) @ v
    return out.transpose(1, 2)


def key_stored_transposed(self, q, k, v):
    return (q @ k / 4.0).softmax(-1) @ v


def key_transposed_sdpa(self, q, k, v):
    return F.scaled_dot_product_attention(q, k.transpose(-2, -1).contiguous(), v)


# -- rows that already call a fused op ------------------------------------------------------------
def sdpa(self, q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def sdpa_float_mask(self, q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def with_mha(self, sizes):
    self.mha = nn.MultiheadAttention(sizes["c"], sizes["h"], batch_first=True)


def mha_no_weights(self, x):
    return self.mha(x, x, x, need_weights=False)[0]


def mha_by_hand(self, x):
    q, k, v = F.linear(x, self.mha.in_proj_weight, self.mha.in_proj_bias).chunk(3, dim=-1)
    q, k, v = (t.unflatten(-1, (self.mha.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    out = (q @ k.transpose(-2, -1) * SCALE).softmax(-1) @ v
    return self.mha.out_proj(out.transpose(1, 2).flatten(2))


def mha_weights(self, x):
    return self.mha(x, x, x, need_weights=True)[0]


def _row(name, first, second, inputs=QKV, setup=None, **more):
    return Spelling(name, first, second, inputs, setup, **more)


TABLE = [
    _row("scale by division", scale_div, scale_mul),
    _row("scale by multiplication", scale_mul, scale_div),
    _row("division and additive mask", scale_div_add, sdpa_float_mask, MASKED.format("add")),
    _row("multiplication and additive mask", scale_mul_add, scale_div_add, MASKED.format("far")),
    _row("query scaled beforehand", scaled_query, scaled_both),
    _row("no scale", no_scale, sdpa_unit_scale),
    _row("learned scale", learned_scale, learned_scale_on_query, setup=with_learned_scale),
    _row("where, multiplication", where_mul, sdpa_keep, MASKED.format("keep")),
    _row("where, division", where_div, where_mul, MASKED.format("keep")),
    _row("masked_fill, multiplication", masked_fill_mul, where_mul, MASKED.format("keep")),
    _row("masked_fill, division", masked_fill_div, sdpa_keep, MASKED.format("keep")),
    _row("inline triu causal", triu_causal, sdpa_causal),
    _row("HF eager with mask", hf_eager, hf_eager_upcast, MASKED.format("far")),
    _row("HF eager without mask", hf_eager_unmasked, hf_eager_unmasked_sdpa),
    _row("GQA repeat_kv", gqa_repeat_kv, gqa_enable, GROUPED),
    _row("GQA repeat_interleave", gqa_repeat_interleave, gqa_unflatten, GROUPED),
    _row("einsum bhqd", einsum_bhqd, scale_mul),
    _row("einsum bshd", einsum_bshd, bshd_sdpa, "q: b s h d, k: b s h d, v: b s h d"),
    _row("baddbmm", baddbmm_scores, bmm_bias, "q: B s d, k: B s d, v: B s d, bias: B s s"),
    _row("bmm 3-D", bmm_3d, baddbmm_empty, "q: B s d, k: B s d, v: B s d"),
    _row("no batch 3-D", no_batch_3d, no_batch_einsum, "q: h s d, k: h s d, v: h s d"),
    _row("softcap", softcap, softcap_folded),
    _row("ALiBi", alibi, alibi_row, setup=with_slopes),
    _row("relative position bias", relative_position_bias, relative_position_embedding,
         setup=with_distance_table, moving="b"),
    _row("T5 bias", t5_bias, t5_bias_sdpa, setup=with_t5_table),
    _row("Swin bias", swin_bias, swin_bias_sdpa, setup=with_swin_window, moving="b",
         sizes={"s": 9}),
    _row("Swin shifted", swin_shifted, swin_shifted_sdpa, setup=with_swin_window, moving="",
         sizes={"s": 9, "b": 6}),
    _row("sinks", sinks, sinks_as_denominator, setup=with_sinks),
    _row("differential", differential, differential_apart,
         QKV + ", q2: b h s d, k2: b h s d", with_differential),
    _row("sigmoid", sigmoid_attention, sigmoid_einsum),
    _row("relu", relu_attention, relu_scaled),
    _row("division after PV", divide_after, scale_mul),
    _row("weights also returned", weights_returned, weights_returned_einsum),
    _row("hand-written softmax", max_subtract, divide_after),
    _row("dropout", dropout, dropout_module, setup=with_dropout),
    _row("5-D windows", windows_5d, windows_folded, "q: b w h s d, k: b w h s d, v: b w h s d"),
    _row("BSHD inputs", bshd_inputs, einsum_bshd, "q: b s h d, k: b s h d, v: b s h d"),
    _row("key stored transposed", key_stored_transposed, key_transposed_sdpa,
         "q: b h s d, k: b h d s, v: b h s d"),
    _row("nn.MHA with weights", mha_weights, mha_by_hand, "x: b s c", with_mha),
]
SDPA_ROWS = [
    _row("F.sdpa", sdpa, scale_div),
    _row("F.sdpa with float mask", sdpa_float_mask, scale_mul_add, QKV + ", mask: b h s s"),
    _row("nn.MHA without weights", mha_no_weights, mha_by_hand, "x: b s c", with_mha),
]
