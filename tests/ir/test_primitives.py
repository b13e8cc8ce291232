"""Primitives P1-P7 and P9 of the mechanisms that attnopt handles, written as one Spec each.

Every test builds the Spec by hand, evaluates the reference in float64 and compares it with the
formula of the mechanism, written in plain torch without the vocabulary.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from attnopt.ir import expr as E
from attnopt.ir.bias import Lookup, RegionFill
from attnopt.ir.mask import (
    BlockMap,
    Causal,
    Globals,
    KeyKeep,
    KeyLifetime,
    Mask,
    Neighborhood,
    Placed,
    Prefix,
    Regions,
    Reindex,
    Segments,
    Select,
    Where,
    Windows,
)

from .checking import assert_equal, attend, draw, qkv, run, spec

D = 8
SC = D**-0.5
q, k, h = E.index("q"), E.index("k"), E.index("h")
scaled = E.score * SC


# -- P1: pointwise score expressions --------------------------------------------------------------
def test_p1_boost_of_chosen_keys_in_the_last_row() -> None:
    query, key, value = qkv()
    boost = torch.zeros(12, dtype=torch.float64)
    boost[3:7] = 0.7
    last = q.eq(E.size("q") - 1)
    made = spec(logits=scaled + E.where(last, E.load("boost") * E.call("abs", scaled), 0.0))
    s = query @ key.mT * SC
    s[:, :, -1] += boost * s[:, :, -1].abs()
    assert_equal(run(made, query, key, value, boost=boost), attend(s, value))


def test_p1_softcap_and_query_only_scale() -> None:
    query, key, value = qkv()
    rows = E.call("log", E.call("float", q + 1))
    made = spec(logits=E.call("tanh", E.score * rows / 5.0) * 5.0, mask=Causal())
    n = torch.arange(1, 13, dtype=torch.float64).log()[:, None]
    s = 5 * torch.tanh(query @ key.mT * n / 5)
    assert_equal(run(made, query, key, value), attend(s, value, torch.ones(12, 12).tril().bool()))


def test_p1_cosine_window_attention_with_table_and_regions() -> None:
    windows, side = 4, 4
    query, key, value = (draw(windows, 2, side * side, D) for _ in range(3))
    query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    scale, table = draw(2, 1, 1).exp(), draw(2, (2 * side - 1) ** 2)
    grid = torch.stack(torch.meshgrid(*[torch.arange(side)] * 2, indexing="ij")).flatten(1)
    delta = grid[:, :, None] - grid[:, None] + side - 1
    index = delta[0] * (2 * side - 1) + delta[1]
    regions = torch.randint(0, 2, (windows, side * side))
    bias = Lookup("table", E.load("index", q, k, dtype=E.INT))
    fill = RegionFill(Regions(E.load("regions", E.index("b"), q, dtype=E.INT), -100.0))
    made = spec(logits=E.score * E.load("scale") + bias.term() + fill.term())
    s = query @ key.mT * scale + table[:, index.flatten()].view(2, side**2, side**2)
    s = s + torch.where(regions[:, :, None] == regions[:, None], 0.0, -100.0)[:, None]
    found = run(made, query, key, value, scale=scale, table=table, index=index, regions=regions)
    assert_equal(found, attend(s, value))


@pytest.mark.parametrize("score", ["distance", "additive"])
def test_p1_other_scores(score: str) -> None:
    query, key, value = qkv()
    if score == "distance":
        made = spec(score=score, logits=E.score * -0.3)
        found = run(made, query, key, value)
        s = -0.3 * torch.cdist(query, key) ** 2
        assert_equal(found, attend(s, value), 1e-11)  # cdist takes a root first
        return
    weight = draw(D)
    made = spec(score=score)
    s = torch.stack([torch.stack([torch.tanh(a + key[:, :, j]) @ weight for j in range(12)], -1)
                     for a in query.unbind(2)], 2)
    assert_equal(run(made, query, key, value, score_weight=weight), attend(s, value))


# -- P2: static masks -----------------------------------------------------------------------------
def check_mask(mask: Mask, kept: torch.Tensor, heads: int = 2, **operands: torch.Tensor) -> None:
    query, key, value = qkv(heads, kept.shape[-1])
    made = spec(logits=scaled, mask=mask)
    expected = attend(query @ key.mT * SC, value, kept)
    assert_equal(run(made, query, key, value, **operands), expected)


def neighbours(i: int, n: int, w: int, s: int, d: int, causal: bool) -> set[int]:
    """One axis of a generalised neighbourhood, by its definition."""
    group, p = i % d, i // d
    total = len(range(group, n, d))
    if causal:
        leader = min(p // s * s + s - 1, total - 1)
        places = [r for r in range(total) if r <= p and leader - r < w]
    else:
        leader = min(p // s * s + s // 2, total - 1)
        centre = min(max(leader, w // 2), total - 1 - (w // 2 - 1 + w % 2))
        places = list(range(centre - w // 2, centre + w // 2 + w % 2))
    return {r * d + group for r in places}


def test_p2_generalised_neighbourhood() -> None:
    grid, window, stride, dilation, causal = (12, 10), (5, 4), (2, 1), (1, 2), (False, True)
    axes = [[neighbours(i, *one) for i in range(one[0])]
            for one in zip(grid, window, stride, dilation, causal, strict=True)]
    kept = torch.tensor([[kr in axes[0][qr] and kc in axes[1][qc]
                          for kr in range(12) for kc in range(10)]
                         for qr in range(12) for qc in range(10)])
    check_mask(Neighborhood(window, stride, dilation, causal, grid), kept)


def test_p2_inward_window_full_in_time() -> None:
    frames, height, width, reach = 2, 6, 7, 2
    token = torch.arange(frames * height * width)
    row, column = token // width % height, token % width

    def inside(x: torch.Tensor, n: int) -> torch.Tensor:
        before = (reach + x - n + 1).clamp(min=0)[:, None]
        after = (reach - x).clamp(min=0)[:, None]
        return (x[None] >= x[:, None] - reach - before) & (x[None] <= x[:, None] + reach + after)

    size = 2 * reach + 1
    mask = Neighborhood((frames, size, size), length=(frames, height, width))
    check_mask(mask, inside(row, height) & inside(column, width))


def test_p2_shifted_groups_of_half_the_heads() -> None:
    heads, n = 4, 16
    group = n // 4
    query, key, value = qkv(heads, n)

    def halves(x: torch.Tensor, shift: int) -> torch.Tensor:
        return torch.cat([x[:, : heads // 2], x[:, heads // 2 :].roll(shift, 2)], 1)

    parts = [halves(x, -(group // 2)).reshape(2, heads, n // group, group, D)
             for x in (query, key, value)]
    inner = attend(parts[0] @ parts[1].mT * SC, parts[2], torch.ones(group, group).tril().bool())
    expected = halves(inner.reshape(2, heads, n, D), group // 2)
    length = E.size("q") // 4
    grouped = Windows(length) & Causal()
    rolled = Reindex((q - length // 2) % E.size("q"), grouped)
    mask = Select(h >= E.size("h") // 2, (grouped, rolled))
    assert_equal(run(spec(logits=scaled, mask=mask), query, key, value), expected)


def test_p2_tokens_attend_to_their_own_chunk() -> None:
    t, height, width = 4, 4, 6
    token = torch.arange(t * height * width)
    chunk = torch.stack([token // (height * width) // 2, token // width % height // 2,
                         token % width // 3])
    kept = (chunk[:, :, None] == chunk[:, None]).all(0)
    check_mask(Windows((2, 2, 3), (t, height, width)), kept)


def test_p2_static_block_map_with_dense_text() -> None:
    blocks = torch.rand(4, 4) < 0.4
    blocks.fill_diagonal_(True)
    kept = blocks.repeat_interleave(3, 0).repeat_interleave(3, 1)
    full = torch.ones(16, 16, dtype=torch.bool)
    full[:12, :12] = kept
    video = Placed(BlockMap("blocks", 3, 3), (0, 12), (0, 12))
    mask = video | Where(q >= 12) | Where(k >= 12)
    check_mask(mask, full, blocks=blocks)


def test_p2_padding_causal_sinks_segments() -> None:
    n = 12
    i, j = torch.arange(n)[:, None], torch.arange(n)
    keep = torch.rand(2, 1, 1, n) < 0.7
    keep[..., 0] = True
    check_mask(Causal() & KeyKeep("pad"), (j <= i) & keep, pad=keep)
    check_mask(Prefix(2) | Globals(1), ((j < 2) | (i < 1)).expand(n, n))
    ids = torch.randint(0, 3, (n,)).sort().values
    check_mask(Segments("rows", "keys"), ids[:, None] == ids, rows=ids[:, None], keys=ids)


# -- P3: dynamic masks ----------------------------------------------------------------------------
def test_p3_key_threshold_per_row_and_key_lifetime() -> None:
    n, width = 16, 5
    query, key, value = qkv(2, n)
    bias = draw(2, 2, 1, n).exp()
    causal = torch.ones(n, n).tril().bool()
    rows = bias.expand(2, 2, n, n).masked_fill(~causal, -torch.inf)
    kept = torch.zeros(2, 2, n, n, dtype=torch.bool)
    kept.scatter_(-1, rows.topk(width, -1).indices, True)
    kept &= causal
    expected = attend(query @ key.mT * SC + bias, value, kept)

    threshold = rows.sort(-1, descending=True).values[..., width - 1 : width]
    threshold = torch.where(threshold.isinf(), -torch.inf, threshold)
    by_row = Causal() & Where(E.load("bias") >= E.load("threshold"))
    made = spec(logits=scaled + E.load("bias"), mask=by_row)
    found = run(made, query, key, value, bias=bias, threshold=threshold)
    assert_equal(found, expected)

    death = kept.long().sum(-2, keepdim=True) + torch.arange(n)
    made = spec(logits=scaled + E.load("bias"), mask=KeyLifetime("death"))
    assert_equal(run(made, query, key, value, bias=bias, death=death), expected)


@pytest.mark.parametrize("rows", [4, 1])
def test_p3_chosen_key_blocks_per_query_block_and_head(rows: int) -> None:
    n, block = 16, 4
    query, key, value = qkv(2, n)
    pooled = key.unflatten(2, (-1, block)).mean(3)
    gate = query.unflatten(2, (-1, rows)).mean(3) @ pooled.mT
    chosen = torch.zeros_like(gate, dtype=torch.bool)
    chosen.scatter_(-1, gate.topk(2, -1).indices, True)
    own = Windows(block)
    kept = chosen.repeat_interleave(rows, 2).repeat_interleave(block, 3)
    token = torch.arange(n) // block
    kept = kept | (token[:, None] == token)
    made = spec(logits=scaled, mask=own | BlockMap("chosen", rows, block, ("b", "h")))
    expected = attend(query @ key.mT * SC, value, kept)
    assert_equal(run(made, query, key, value, chosen=chosen), expected)


def test_p3_token_head_pairs_switched_off() -> None:
    query, key, value = qkv(4)
    on = torch.rand(2, 4, 12, 1) < 0.5
    expected = attend(query @ key.mT * SC, value) * on
    made = spec(logits=scaled, mask=Where(E.load("on", dtype=E.BOOL)), empty_row="zero")
    assert_equal(run(made, query, key, value, on=on), expected)


def test_p3_static_mask_chosen_per_sample() -> None:
    query, key, value = qkv()
    sparse = torch.tensor([1, 0])
    i, j = torch.arange(12)[:, None], torch.arange(12)
    streaming = (j <= i) & ((j < 2) | (i // 3 - j // 3 <= 1))
    kept = torch.stack([j <= i, streaming])[sparse][:, None]
    window = Where(q // 3 - k // 3 <= 1)
    which = E.load("sparse", E.index("b"), dtype=E.INT)
    made = spec(logits=scaled, mask=Causal() & Select(which, (Causal(), window | Prefix(2))))
    found = run(made, query, key, value, sparse=sparse)
    assert_equal(found, attend(query @ key.mT * SC, value, kept))


# -- P4: exact low rank -------------------------------------------------------------------------
def test_p4_factorised_bias() -> None:
    query, key, value = qkv()
    i = torch.arange(12, dtype=torch.float64)
    slopes = torch.tensor([0.5, 0.25], dtype=torch.float64)[:, None, None]
    left = slopes * torch.stack([-i, torch.ones_like(i)], -1)
    right = torch.stack([torch.ones_like(i), i], -1)
    made = spec(logits=scaled + E.inner("left", "right"))
    expected = attend(query @ key.mT * SC + slopes * (i[None] - i[:, None]), value)
    assert_equal(run(made, query, key, value, left=left, right=right), expected)
    closed = spec(logits=scaled + E.load("slopes") * (k - q))
    assert_equal(run(closed, query, key, value, slopes=slopes), expected)


def test_p4_squared_distance_of_positions() -> None:
    query, key, value = qkv()
    x, y = draw(12, 3), draw(12, 3)
    left = torch.cat([2 * x, -(x**2).sum(-1, keepdim=True), torch.ones(12, 1)], -1)
    right = torch.cat([y, torch.ones(12, 1), -(y**2).sum(-1, keepdim=True)], -1)
    made = spec(logits=scaled + E.inner("left", "right"))
    s = query @ key.mT * SC - (x[:, None] - y).square().sum(-1)
    found = run(made, query, key, value, left=left.double(), right=right.double())
    assert_equal(found, attend(s, value))


# -- P5: key groups -----------------------------------------------------------------------------
def test_p5_redistribution_of_the_mass_of_sink_tokens() -> None:
    n, first, last, p, rho, least = 20, 4, 14, 0.6, 0.9, 0.2
    query, key, value = qkv(2, n)
    image = torch.zeros(n, dtype=torch.bool)
    image[first:last] = True
    sinks = torch.zeros(n, dtype=torch.bool)
    sinks[[0, 6, 9]] = True
    # 0 the rest, 1 sinks outside of the image, 2 sinks inside, 3 the rest of the image
    group = torch.where(image, torch.where(sinks, 2, 3), torch.where(sinks, 1, 0))

    attention = torch.softmax(query @ key.mT * SC, -1)
    expected = attention.clone()
    in_image, in_sinks = attention[..., image].sum(-1), attention[..., image & sinks].sum(-1)
    chosen = (in_sinks / in_image <= rho) & (in_image >= least)
    for index in chosen.nonzero().tolist():
        row = expected[tuple(index)]
        if index[-1] < last:  # only queries behind the image
            continue
        budget = (1 - p) * row[sinks].sum()
        row[sinks] *= p
        row[image & ~sinks] += budget * row[image & ~sinks] / row[image & ~sinks].sum()

    of = E.load("group", k, dtype=E.INT)
    mass = {g: E.stat(f"mass:{g}") for g in (1, 2, 3)}
    images = mass[2] + mass[3]
    rows = (q >= last) & (mass[2] / images <= rho) & (images >= least)
    more = 1.0 + (1 - p) * (mass[1] + mass[2]) / mass[3]
    factor = E.where(of.eq(3), more, E.where(of.eq(0), 1.0, p))
    made = spec(logits=scaled, groups=of, weights=E.weight * E.where(rows, factor, 1.0))
    assert_equal(run(made, query, key, value, group=group), expected @ value)
    assert 0 < chosen[..., last:].sum()


def test_p5_learned_sinks_and_gradient() -> None:
    query, key, value = qkv()
    sink = draw(2, 1, 1).requires_grad_()
    s = torch.cat([query @ key.mT * SC, sink.expand(2, 2, 12, 1)], -1)
    expected = torch.softmax(s, -1)[..., :-1] @ value
    found = run(spec(logits=scaled, sinks=E.load("sink")), query, key, value, sink=sink)
    assert_equal(found, expected)
    grads = [torch.autograd.grad(x.square().sum(), sink)[0] for x in (found, expected)]
    assert_equal(*grads)


# -- P6: output epilogues -------------------------------------------------------------------------
@pytest.mark.parametrize("extra", ["identity", "prefix sum", "mean", "convolution", "gate"])
def test_p6_scale_and_extra_term(extra: str) -> None:
    query, key, value = qkv()
    alpha, beta = torch.rand(2, 2, 12, 1).double(), torch.rand(2, 1, 1).double()
    plain = attend(query @ key.mT * SC, value)
    if extra == "identity":
        made = spec(logits=scaled, output=(1.0 - E.load("beta")) * E.out + E.load("beta") * E.value)
        found = run(made, query, key, value, beta=beta)
        assert_equal(found, (1 - beta) * plain + beta * value)
        return
    if extra == "gate":
        made = spec(logits=scaled, output=E.out * E.load("alpha"))
        assert_equal(run(made, query, key, value, alpha=alpha), plain * alpha)
        return
    term = {"prefix sum": value.cumsum(-2), "mean": value.mean(-2, keepdim=True),
            "convolution": F.avg_pool1d(value.flatten(0, 1).mT, 3, 1, 1).mT.view_as(value)}[extra]
    made = spec(logits=scaled, output=E.load("alpha") * E.out + E.load("beta") * E.load("extra"))
    found = run(made, query, key, value, alpha=alpha, beta=beta, extra=term)
    assert_equal(found, alpha * plain + beta * term)


def test_p6_affine_weights_reach_keys_that_are_not_kept() -> None:
    query, key, value = qkv()
    alpha, beta = torch.rand(2, 2, 12, 1).double(), torch.rand(2, 2, 12, 1).double()
    made = spec(logits=scaled, mask=Causal(), weights=E.load("a") * E.weight + E.load("b"))
    attention = torch.softmax(
        (query @ key.mT * SC).masked_fill(~torch.ones(12, 12).tril().bool(), -torch.inf), -1)
    found = run(made, query, key, value, a=alpha, b=beta)
    assert_equal(found, (alpha * attention + beta) @ value)


def test_p6_condition_on_the_row_maximum() -> None:
    query, key, value = qkv()
    query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    feature, t, threshold = draw(2, 2, 12, D), 0.1, 0.5
    similar = query @ key.mT
    chosen = similar.amax(-1, keepdim=True) > threshold
    expected = torch.where(chosen, feature + 0.3 * attend(similar / t, value), 0.0)
    made = spec(logits=E.score / t, output=E.where(
        E.stat("max") * t > threshold, E.load("feature") + E.out * 0.3, 0.0))
    assert_equal(run(made, query, key, value, feature=feature), expected)


# -- P7: two-pass normalisers ---------------------------------------------------------------------
@pytest.mark.parametrize("power", [0, 3, 15])
def test_p7_softplus_attention_with_reweighting(power: int) -> None:
    n, eps = 24, 1e-8
    query, key, value = qkv(2, n)
    query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    visible = torch.arange(1, n + 1, dtype=torch.float64)[:, None]
    causal = torch.ones(n, n, dtype=torch.float64).tril()
    a = F.softplus(math.log(D) * visible.log() * (query @ key.mT)) * causal
    a = a / (a.sum(-1, keepdim=True) + eps)
    logits = E.score * E.call("log", E.call("float", q + 1)) * math.log(D)
    base = E.weight / (E.stat("sum") + eps)
    if power == 0:
        made = spec(logits=logits, mask=Causal(), normalizer="softplus", weights=base)
        assert_equal(run(made, query, key, value), a @ value)
        return
    offset = (torch.arange(n)[:, None] >= 3).double()
    w = torch.relu(a * visible - offset) ** power
    expected = w / (w.sum(-1, keepdim=True) + eps) @ value
    more = E.call("relu", base * E.stat("count") - E.where(q >= 3, 1.0, 0.0))
    made = spec(logits=logits, mask=Causal(), normalizer="softplus",
                weights=E.call("pow", more, float(power)), output=E.out / (E.stat("total") + eps))
    assert_equal(run(made, query, key, value), expected)
    plain = made.with_(weights=E.weight, l1=True, renormalize=True, output=E.out)
    assert_equal(run(plain, query, key, value), a @ value, 1e-7)  # without eps


# -- P9: key-only logits ------------------------------------------------------------------------
def test_p9_key_only_logits() -> None:
    query, key, value = qkv()
    logit = draw(2, 2, 1, 12)
    made = spec(score="key", logits=E.load("logit"), mask=Causal())
    weight = logit.mT.exp()
    expected = (weight * value).cumsum(-2) / weight.cumsum(-2)
    assert_equal(run(made, query, key, value, logit=logit), expected)


# -- heads --------------------------------------------------------------------------------------
def test_heads_mixed_before_and_after() -> None:
    query, key, value = qkv()
    before, after = draw(2, 2), draw(2, 2)
    made = spec(logits=scaled, mask=Causal(), mix_logits="before", mix_weights="after")
    s = torch.einsum("bhqk,gh->bgqk", query @ key.mT * SC, before)
    weight = torch.softmax(s.masked_fill(~torch.ones(12, 12).tril().bool(), -torch.inf), -1)
    expected = torch.einsum("bhqk,gh->bgqk", weight, after) @ value
    assert_equal(run(made, query, key, value, before=before, after=after), expected)
