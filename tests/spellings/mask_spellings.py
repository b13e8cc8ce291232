"""Masks in every idiom: how a key is left out, and how the mask itself comes about.

Pairs differ in the idiom and agree on every row that keeps at least one key. What a fully masked
row gives depends on the idiom, so such rows are in `EMPTY_ROWS`, whose pairs agree there as well.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.spellings.program import CROSS, MOVING, QKV, Spelling

KEYS = QKV + ", mask: keep b s"
DENSE = QKV + ", mask: keep b 1 s s"


def attend(scores, v):
    return torch.softmax(scores, dim=-1) @ v


def scored(q, k):
    return q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))


def lower(q, k):
    """True where a key is not after the query."""
    at_q, at_k = torch.arange(q.size(-2)), torch.arange(k.size(-2))
    return at_k[None, :] <= at_q[:, None]


def by_sdpa_keep(self, q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def by_sdpa_keys(self, q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])


def by_sdpa_causal(self, q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


# -- how a key is left out ------------------------------------------------------------------------
def where_minus_infinity(self, q, k, v, mask):
    return attend(torch.where(mask, scored(q, k), float("-inf")), v)


def where_reversed(self, q, k, v, mask):
    return attend(torch.where(~mask, torch.tensor(-1e9, dtype=q.dtype), scored(q, k)), v)


def masked_fill_least(self, q, k, v, mask):
    scores = scored(q, k)
    return attend(scores.masked_fill(mask.logical_not(), torch.finfo(scores.dtype).min), v)


def masked_fill_billion(self, q, k, v, mask):
    return attend(scored(q, k).masked_fill(mask == 0, -1e9), v)


def masked_fill_in_place(self, q, k, v, mask):
    scores = scored(q, k)
    scores.masked_fill_(~mask, -math.inf)
    return attend(scores, v)


def assigned_at_mask(self, q, k, v, mask):
    scores = scored(q, k)
    scores[~mask.expand_as(scores)] = -math.inf
    return attend(scores, v)


def complement_times_least(self, q, k, v, mask):
    keep = mask[:, None, None, :].to(q.dtype)
    return attend(scored(q, k) + (1.0 - keep) * torch.finfo(q.dtype).min, v)


def complement_times_billion(self, q, k, v, mask):
    keep = mask.unsqueeze(1).unsqueeze(2).to(dtype=q.dtype)
    return attend(scored(q, k) + (1.0 - keep) * -1e9, v)


def inverted_filled(self, q, k, v, mask):
    inverted = 1.0 - mask[:, None, None, :].to(q.dtype)
    inverted = inverted.masked_fill(inverted.to(torch.bool), torch.finfo(q.dtype).min)
    return attend(scored(q, k) + inverted, v)


def product_then_add(self, q, k, v, mask):
    keep = mask[:, None, None, :].to(q.dtype)
    return attend(scored(q, k) * keep - 1e9 * (1 - keep), v)


def log_of_mask(self, q, k, v, mask):
    return attend(scored(q, k) + mask[:, None, None, :].to(q.dtype).log(), v)


def zero_and_renormalise(self, q, k, v, mask):
    weights = scored(q, k).softmax(-1) * mask[:, None, None, :]
    return (weights / weights.sum(-1, keepdim=True)) @ v


def exponentials_masked(self, q, k, v, mask):
    scores = scored(q, k)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True)) * mask[:, None, None, :]
    return (weights @ v) / weights.sum(-1, keepdim=True)


# -- causal ---------------------------------------------------------------------------------------
def causal_arange(self, q, k, v):
    return attend(scored(q, k).masked_fill(~lower(q, k), -math.inf), v)


def causal_tril_ones(self, q, k, v):
    keep = torch.tril(torch.ones(q.size(-2), k.size(-2))).bool()
    return attend(torch.where(keep, scored(q, k), torch.finfo(q.dtype).min), v)


def causal_triu_bool(self, q, k, v):
    drop = torch.triu(torch.ones(q.size(-2), k.size(-2), dtype=torch.bool), diagonal=1)
    return attend(scored(q, k).masked_fill(drop, float("-inf")), v)


def causal_square(self, q, k, v):
    mask = nn.Transformer.generate_square_subsequent_mask(q.size(-2))
    return attend(scored(q, k) + mask.to(q.dtype), v)


def with_causal_buffer(self, sizes):
    n = 32
    self.register_buffer("bias", torch.tril(torch.ones(n, n, dtype=torch.bool)).view(1, 1, n, n))


def causal_sliced_buffer(self, q, k, v):
    keep = self.bias[:, :, : q.size(-2), : k.size(-2)]
    least = torch.full([], torch.finfo(q.dtype).min, dtype=q.dtype)
    return attend(torch.where(keep, scored(q, k), least), v)


def with_causal_attribute(self, sizes):
    self.causal = torch.full((32, 32), float("-inf")).triu(1)


def causal_attribute(self, q, k, v):
    mask = self.causal[: q.size(-2), : k.size(-2)].to(q.dtype)
    return attend(scored(q, k) + mask, v)


def causal_slices_written(self, q, k, v):
    length = q.size(-2)
    mask = torch.zeros(length, length, dtype=torch.bool)
    mask[:, :] = torch.arange(length)[None, :] > torch.arange(length)[:, None]
    return attend(scored(q, k).masked_fill(mask, -math.inf), v)


def causal_ge_positions(self, q, k, v):
    at = torch.arange(q.size(-2)).unsqueeze(0)
    keep = at.unsqueeze(-1) >= at.unsqueeze(-2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None])


def causal_cumsum(self, q, k, v):
    at = torch.ones(q.size(-2), dtype=torch.long).cumsum(0)
    bias = torch.where(at[:, None] < at[None, :], -math.inf, 0.0)
    return attend(scored(q, k) + bias.to(q.dtype), v)


def causal_and_keys(self, q, k, v, mask):
    keep = lower(q, k)[None, None] & mask[:, None, None, :]
    return attend(scored(q, k).masked_fill(~keep, torch.finfo(q.dtype).min), v)


def causal_plus_keys(self, q, k, v, mask):
    least = torch.finfo(q.dtype).min
    causal = torch.triu(torch.full((q.size(-2), k.size(-2)), least, dtype=q.dtype), 1)
    keys = (1 - mask[:, None, None, :].to(q.dtype)) * least
    return attend(scored(q, k) + causal.clamp(min=least / 4) + keys / 4, v)


def causal_then_keys(self, q, k, v, mask):
    scores = scored(q, k).masked_fill(torch.logical_not(lower(q, k)), -1e9)
    return attend(scores.masked_fill(~mask[:, None, None, :], -1e9), v)


# -- windows, segments, lengths -------------------------------------------------------------------
def window_band(self, q, k, v):
    step = torch.arange(q.size(-2))[:, None] - torch.arange(k.size(-2))[None, :]
    return attend(torch.where((step >= 0) & (step < 4), scored(q, k), -math.inf), v)


def window_tril_triu(self, q, k, v):
    keep = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool).tril().triu(-3)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


def window_abs(self, q, k, v):
    at = torch.arange(q.size(-2))
    far = (at[None, :] - at[:, None]).abs() > 2
    return attend(scored(q, k) + far.to(q.dtype) * -1e4, v)


def window_both_sides(self, q, k, v):
    keep = torch.ones(q.size(-2), k.size(-2)).tril(2).triu(-2)
    return attend(scored(q, k).masked_fill(keep == 0, -math.inf), v)


def lengths_arange(self, q, k, v, lengths):
    keep = torch.arange(k.size(-2))[None, :] < lengths[:, None]
    return attend(scored(q, k).masked_fill(~keep[:, None, None, :], -math.inf), v)


def lengths_sdpa(self, q, k, v, lengths):
    keep = torch.arange(k.size(-2)).view(1, 1, 1, -1) < lengths.view(-1, 1, 1, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


def segments(self, q, k, v, ids):
    same = ids[:, :, None] == ids[:, None, :]
    return attend(scored(q, k).masked_fill(~same[:, None], -math.inf), v)


def segments_sdpa(self, q, k, v, ids):
    same = (ids.unsqueeze(-1) - ids.unsqueeze(-2)) == 0
    return F.scaled_dot_product_attention(q, k, v, attn_mask=same.unsqueeze(1))


def with_regions(self, sizes):
    region = torch.arange(sizes["s"]) // 4
    self.register_buffer("shift", (region[:, None] != region[None, :]) * -100.0)
    self.register_buffer("region", region)


def regions_hundred(self, q, k, v):
    return attend(scored(q, k) + self.shift.to(q.dtype), v)


def regions_hundred_where(self, q, k, v):
    same = self.region[:, None] == self.region[None, :]
    return attend(scored(q, k) + torch.where(same, 0.0, -100.0).to(q.dtype), v)


# -- masks that keep all --------------------------------------------------------------------------
def plain(self, q, k, v):
    return attend(scored(q, k), v)


def all_keep_ones(self, q, k, v):
    keep = torch.ones(q.size(0), k.size(-2), dtype=torch.bool)
    return attend(scored(q, k).masked_fill(~keep[:, None, None, :], -math.inf), v)


def all_keep_zeros(self, q, k, v):
    mask = (1.0 - torch.ones(q.size(0), 1, 1, k.size(-2), dtype=q.dtype)) * -1e4
    return attend(scored(q, k) + mask, v)


def with_zero_mask(self, sizes):
    self.register_buffer("mask", torch.zeros(1, 1, 1, 64))


def all_keep_buffer(self, q, k, v):
    return attend(scored(q, k) + self.mask[..., : k.size(-2)].to(q.dtype), v)


def all_keep_input(self, q, k, v, mask):
    return attend(scored(q, k).masked_fill(~mask[:, None, None, :], -math.inf), v)


# -- rows without any key -------------------------------------------------------------------------
def empty_nan(self, q, k, v, lengths):
    keep = torch.arange(k.size(-2))[None, :] < (lengths - 1)[:, None]
    return attend(scored(q, k).masked_fill(~keep[:, None, None, :], -math.inf), v)


def empty_nan_where(self, q, k, v, lengths):
    keep = (torch.arange(k.size(-2))[None, :] < (lengths - 1)[:, None])[:, None, None]
    return attend(torch.where(keep, scored(q, k), -math.inf), v)


def empty_uniform(self, q, k, v, lengths):
    keep = torch.arange(k.size(-2))[None, :] < (lengths - 1)[:, None]
    least = torch.finfo(q.dtype).min
    return attend(scored(q, k).masked_fill(~keep[:, None, None, :], least), v)


def empty_uniform_where(self, q, k, v, lengths):
    keep = (torch.arange(k.size(-2))[None, :] < (lengths - 1)[:, None])[:, None, None]
    return attend(torch.where(keep, scored(q, k), -1e9), v)


def empty_zero(self, q, k, v, lengths):
    keep = (torch.arange(k.size(-2))[None, :] < (lengths - 1)[:, None])[:, None, None]
    weights = scored(q, k).masked_fill(~keep, -1e9).softmax(-1)
    return weights.masked_fill(~keep, 0.0) @ v


def empty_zero_sdpa(self, q, k, v, lengths):
    keep = (torch.arange(k.size(-2))[None, :] < (lengths - 1)[:, None])[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


def strictly_before(q, k):
    return torch.arange(k.size(-2))[None, :] < torch.arange(q.size(-2))[:, None]


def before_where(self, q, k, v):
    return attend(torch.where(strictly_before(q, k), scored(q, k), -math.inf), v)


def before_filled(self, q, k, v):
    return attend(scored(q, k).masked_fill(~strictly_before(q, k), -math.inf), v)


def before_least(self, q, k, v):
    return attend(scored(q, k).masked_fill(~strictly_before(q, k), -1e9), v)


def before_least_where(self, q, k, v):
    least = torch.finfo(q.dtype).min
    return attend(torch.where(strictly_before(q, k), scored(q, k), least), v)


def query_lower(self, q, k, v):
    return attend(scored(q, k).masked_fill(~lower(q, k), -math.inf), v)


def sdpa_top_left(self, q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


# -- nn.MultiheadAttention ------------------------------------------------------------------------
def with_mha(self, sizes):
    self.mha = nn.MultiheadAttention(sizes["c"], sizes["h"], batch_first=True)


def mha_padding(self, x, mask):
    return self.mha(x, x, x, key_padding_mask=~mask, need_weights=False)[0]


def mha_padding_weights(self, x, mask):
    return self.mha(x, x, x, key_padding_mask=~mask)[0]


def mha_causal(self, x):
    mask = nn.Transformer.generate_square_subsequent_mask(x.size(1), dtype=x.dtype)
    return self.mha(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]


def mha_causal_bool(self, x):
    drop = torch.ones(x.size(1), x.size(1), dtype=torch.bool).triu(1)
    return self.mha(x, x, x, attn_mask=drop)[0]


def mha_cross(self, x, y):
    return self.mha(x, y, y, need_weights=False)[0]


def mha_cross_weights(self, x, y):
    return self.mha(x, y, y, average_attn_weights=False)[0]


def _mask(name, first, second, inputs=QKV, setup=None, **more):
    return Spelling(name, first, second, inputs, setup, **more)


DROPPED = [
    _mask("where -inf / sdpa bool", where_minus_infinity, by_sdpa_keep, DENSE),
    _mask("where with the mask reversed", where_reversed, by_sdpa_keep, DENSE),
    _mask("masked_fill finfo.min / -1e9", masked_fill_least, masked_fill_billion, DENSE),
    _mask("masked_fill_ in place", masked_fill_in_place, by_sdpa_keep, DENSE),
    _mask("assignment at a mask", assigned_at_mask, where_minus_infinity, DENSE,
          required=False),
    _mask("(1 - m) * min / (1 - m) * -1e9", complement_times_least, complement_times_billion,
          KEYS),
    _mask("inverted mask filled", inverted_filled, by_sdpa_keys, KEYS),
    _mask("scores * m - 1e9 * (1 - m)", product_then_add, by_sdpa_keys, KEYS,
          required=False),
    _mask("log of the mask", log_of_mask, by_sdpa_keys, KEYS, required=False),
    _mask("zeroed and normalised again", zero_and_renormalise, exponentials_masked, KEYS,
          required=False),
]
CAUSAL = [
    _mask("causal arange / tril ones", causal_arange, causal_tril_ones),
    _mask("causal triu bool / square mask", causal_triu_bool, causal_square),
    _mask("causal buffer slice", causal_sliced_buffer, by_sdpa_causal, setup=with_causal_buffer),
    _mask("causal plain attribute", causal_attribute, by_sdpa_causal, setup=with_causal_attribute),
    _mask("causal written by slices", causal_slices_written, by_sdpa_causal),
    _mask("causal >= positions / cumsum", causal_ge_positions, causal_cumsum),
    _mask("causal and keys", causal_and_keys, causal_plus_keys, KEYS),
    _mask("causal then keys", causal_then_keys, causal_and_keys, KEYS),
    _mask("causal cross (top left)", query_lower, sdpa_top_left, CROSS),
]
STRUCTURED = [
    _mask("window band / tril triu", window_band, window_tril_triu),
    _mask("window abs / both sides", window_abs, window_both_sides),
    _mask("key lengths", lengths_arange, lengths_sdpa, QKV + ", lengths: count b"),
    _mask("segments", segments, segments_sdpa, QKV + ", ids: count b s"),
    _mask("regions at -100", regions_hundred, regions_hundred_where, setup=with_regions,
          moving="b"),
]
ALL_KEEP = [
    _mask("all keep: ones / zeros", all_keep_ones, all_keep_zeros),
    _mask("all keep: buffer", all_keep_buffer, plain, setup=with_zero_mask),
    _mask("all keep: user's input", all_keep_input, by_sdpa_keys, QKV + ", mask: ones b s"),
]
EMPTY_ROWS = [
    # The first row is NaN; its gradients are not, as where and masked_fill pass none on.
    _mask("strictly before, -inf", before_where, before_filled),
    _mask("strictly before, least", before_least, before_least_where),
    _mask("empty rows are NaN", empty_nan, empty_nan_where, QKV + ", lengths: count b",
          sizes={"s": 3}, moving=MOVING.replace("s", "")),
    _mask("empty rows are uniform", empty_uniform, empty_uniform_where,
          QKV + ", lengths: count b", sizes={"s": 3}, moving=MOVING.replace("s", "")),
    _mask("empty rows are zero", empty_zero, empty_zero_sdpa, QKV + ", lengths: count b",
          sizes={"s": 3}, moving=MOVING.replace("s", "")),
]
MODULES = [
    _mask("nn.MHA key padding", mha_padding, mha_padding_weights, "x: b s c, mask: keep b s",
          with_mha),
    _mask("nn.MHA causal", mha_causal, mha_causal_bool, "x: b s c", with_mha),
    _mask("nn.MHA cross", mha_cross, mha_cross_weights, "x: b q c, y: b k c", with_mha),
    _mask("nn.MHA without batch", mha_cross, mha_cross_weights, "x: q c, y: k c", with_mha),
]
MASKS = MODULES + DROPPED + CAUSAL + STRUCTURED + ALL_KEEP + EMPTY_ROWS
