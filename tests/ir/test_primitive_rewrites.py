"""Primitives that are more than one Spec, written as Rewrites: P3-P5, P8 and P10-P13.

A Rewrite is a small graph of plain torch operations and attention calls. Every test builds it by
hand, evaluates it in float64 with the reference in place of the op, and compares it with the
formula of the mechanism.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import attnopt.kernels.ops  # noqa: F401  registers the op that the graphs call
from attnopt.ir import expr as E
from attnopt.ir.mask import Causal
from attnopt.ir.rewrite import Rewrite, attention

from .checking import assert_equal, attend, call_reference, draw, qkv, spec

D = 8
SC = D**-0.5
q, k = E.index("q"), E.index("k")
SCALED = spec(logits=E.score * SC)
PLAIN = spec()


def check(function: object, expected: Tensor, calls: int = 0, **inputs: Tensor) -> None:
    rewrite = Rewrite.of(function, tuple(inputs))  # type: ignore[arg-type]
    assert len(rewrite.specs) == calls
    assert_equal(rewrite.evaluate(inputs, call_reference), expected)


def test_a_bare_spec_is_a_rewrite_of_one_site() -> None:
    query, key, value = qkv()
    made = spec(logits=E.score * SC + E.load("bias"))
    rewrite = Rewrite.of_spec(made)
    bias = draw(12, 12)
    assert rewrite.specs == (made,) and rewrite.inputs == ("query", "key", "value", "bias")
    inputs = {"query": query, "key": key, "value": value, "bias": bias}
    expected = attend(query @ key.mT * SC + bias, value)
    assert_equal(rewrite.evaluate(inputs, call_reference)[0], expected)
    assert_equal(rewrite.evaluate(inputs)[0], expected)  # the op itself
    with pytest.raises(ValueError, match="got no .'bias'."):
        rewrite.evaluate({"query": query, "key": key, "value": value})


def test_p3_only_the_rows_of_a_head_that_are_on() -> None:
    query, key, value = qkv(4)
    on = torch.zeros(4, 12, dtype=torch.bool)
    on[torch.arange(4)[:, None], torch.rand(4, 12).topk(5).indices] = True
    rows = on.nonzero()[:, 1].view(1, 4, 5, 1).expand(2, 4, 5, D)

    def rewritten(query: Tensor, key: Tensor, value: Tensor, rows: Tensor) -> Tensor:
        out = attention(query.gather(2, rows), key, value, [], SCALED)[0]
        return torch.zeros_like(query).scatter(2, rows, out)

    expected = attend(query @ key.mT * SC, value) * on[:, :, None]
    check(rewritten, expected, 1, query=query, key=key, value=value, rows=rows)


def test_p4_factors_as_columns_of_query_and_key() -> None:
    query, key, value = qkv()
    left, right = draw(2, 12, 3), draw(2, 12, 3)

    def rewritten(query: Tensor, key: Tensor, value: Tensor, left: Tensor, right: Tensor) -> Tensor:
        wide = torch.cat([query * SC, left.expand(2, -1, -1, -1)], -1)
        return attention(wide, torch.cat([key, right.expand(2, -1, -1, -1)], -1), value, [],
                         PLAIN)[0]

    expected = attend(query @ key.mT * SC + left @ right.mT, value)
    check(rewritten, expected, 1, query=query, key=key, value=value, left=left, right=right)


def test_p5_registers_merged_by_log_sum_exp() -> None:
    query, key, value = qkv()
    more_key, more_value = draw(1, 2, 4, D), draw(1, 2, 4, D)

    def rewritten(query: Tensor, key: Tensor, value: Tensor, more_key: Tensor,
                  more_value: Tensor) -> Tensor:
        first, lse1 = attention(query, key, value, [], SCALED)
        second, lse2 = attention(query, more_key, more_value, [], SCALED)
        share = torch.sigmoid(lse2 - lse1).unsqueeze(-1)
        return first * (1 - share) + second * share

    both = torch.cat([key, more_key.expand(2, -1, -1, -1)], 2)
    values = torch.cat([value, more_value.expand(2, -1, -1, -1)], 2)
    expected = attend(query @ both.mT * SC, values)
    check(rewritten, expected, 2, query=query, key=key, value=value, more_key=more_key,
          more_value=more_value)


# -- P8 -------------------------------------------------------------------------------------------
def test_p8_linear_attention_reassociated() -> None:
    query, key, value = qkv(2, 20)

    def rewritten(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return query.softmax(-1) @ (key.softmax(-2).transpose(-1, -2) @ value)

    dense = spec(normalizer="identity")
    query_, key_ = query.softmax(-1), key.softmax(-2)
    expected = call_reference(query_, key_, value, [], dense)[0]
    assert_equal(expected, (query_ @ key_.mT) @ value)
    check(rewritten, expected, query=query, key=key, value=value)


def test_p8_causal_taylor_attention_by_chunks() -> None:
    n, chunk = 20, 5
    query, key, value = qkv(2, n)
    x = E.score * SC
    dense = spec(logits=x * x / 2.0 + x + 1.0, mask=Causal(), normalizer="identity", l1=True)
    expected = call_reference(query, key, value, [], dense)[0]
    s = query @ key.mT * SC
    a = (1 + s + s**2 / 2).tril()
    assert_equal(expected, a / a.sum(-1, keepdim=True) @ value)

    def features(x: Tensor) -> Tensor:
        square = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)
        return torch.cat([torch.ones_like(x[..., :1]), x * SC**0.5, square * (SC * 0.5**0.5)], -1)

    def rewritten(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        left, right = features(query), features(key)
        ones = torch.cat([value, torch.ones_like(value[..., :1])], -1)
        state, parts = 0.0, []
        for start in range(0, n, chunk):
            rows = slice(start, start + chunk)
            own_left, own_right = left[:, :, rows], right[:, :, rows]
            inside = (own_left @ own_right.transpose(-1, -2)).tril() @ ones[:, :, rows]
            before = own_left @ state if start else 0.0
            parts.append(inside + before)
            state = own_right.transpose(-1, -2) @ ones[:, :, rows] + state
        total = torch.cat(parts, 2)
        return total[..., :-1] / total[..., -1:]

    check(rewritten, expected, query=query, key=key, value=value)


# -- P10 ------------------------------------------------------------------------------------------
def corners(size: int, at: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(index, weight) of the two neighbours of a pixel coordinate, weight 0 outside."""
    low = torch.floor(at)
    pairs = []
    for place, weight in ((low, low + 1 - at), (low + 1, at - low)):
        inside = (place >= 0) & (place <= size - 1)
        pairs.append((place.clamp(0, size - 1).long(), torch.where(inside, weight, 0.0)))
    return pairs


def test_p10_bilinear_sampling_with_weights() -> None:
    height, width, rows, points = 6, 7, 10, 4
    value, place = draw(3, D, height, width), draw(3, rows, points, 2) * 1.2
    weight = draw(3, rows, points).softmax(-1)
    sampled = F.grid_sample(value, place, align_corners=False)
    expected = (sampled * weight[:, None]).sum(-1).mT

    def rewritten(value: Tensor, place: Tensor, weight: Tensor) -> Tensor:
        tokens, total = value.flatten(2).transpose(1, 2), 0.0
        x, y = ((place[..., i] + 1) * n / 2 - 0.5 for i, n in ((0, width), (1, height)))
        for row, wy in corners(height, y):
            for column, wx in corners(width, x):
                index = (row * width + column).flatten(1).unsqueeze(-1).expand(-1, -1, D)
                taken = tokens.gather(1, index).unflatten(1, (rows, points))
                total = (wy * wx * weight).unsqueeze(-1) * taken + total
        return total.sum(2)

    check(rewritten, expected, value=value, place=place, weight=weight)


def test_p10_lifted_sampling_without_the_volume() -> None:
    depths, height, width, rows, points = 5, 6, 7, 10, 4
    value, depth = draw(1, D, height, width), draw(1, depths, height, width).softmax(1)
    place, weight = draw(1, rows, points, 3) * 1.2, draw(1, rows, points).softmax(-1)
    volume = value[:, :, None] * depth[:, None]
    sampled = F.grid_sample(volume, place[:, None], align_corners=False)[:, :, 0]
    expected = (sampled * weight[:, None]).sum(-1).mT

    def rewritten(value: Tensor, depth: Tensor, place: Tensor, weight: Tensor) -> Tensor:
        tokens, lifted, total = value.flatten(2).transpose(1, 2), depth.flatten(1), 0.0
        sizes = ((0, width), (1, height), (2, depths))
        x, y, z = ((place[..., i] + 1) * n / 2 - 0.5 for i, n in sizes)
        for row, wy in corners(height, y):
            for column, wx in corners(width, x):
                pixel = row * width + column
                share = 0.0
                for layer, wz in corners(depths, z):
                    flat = (layer * (height * width) + pixel).flatten(1)
                    share = lifted.gather(1, flat).unflatten(1, (rows, points)) * wz + share
                index = pixel.flatten(1).unsqueeze(-1).expand(-1, -1, D)
                taken = tokens.gather(1, index).unflatten(1, (rows, points))
                total = (wy * wx * weight * share).unsqueeze(-1) * taken + total
        return total.sum(2)

    check(rewritten, expected, value=value, depth=depth, place=place, weight=weight)


# -- P11, P12 -------------------------------------------------------------------------------------
def test_p11_projections_folded_into_one() -> None:
    n, channels = 10, 6
    x = draw(2, n, channels)
    wq, wk, wv, wo = (draw(channels, channels) for _ in range(4))
    bq, bk, bv = (draw(channels) for _ in range(3))
    projected = [F.linear(x, w, b) for w, b in ((wq, bq), (wk, bk), (wv, bv))]
    expected = F.linear(attend(projected[0] @ projected[1].mT, projected[2]), wo)
    with_column = spec(logits=E.score + E.load("column"))

    def rewritten(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, bq: Tensor,
                  bv: Tensor) -> Tensor:
        column = (x @ (wk.t() @ bq)).unsqueeze(-2)  # the bias of the keys vanishes in the softmax
        mixed = attention(x @ (wq.t() @ wk), x, x, [column], with_column)[0]
        return mixed @ (wo @ wv).t() + wo @ bv

    check(rewritten, expected, 1, x=x, wq=wq, wk=wk, wv=wv, wo=wo, bq=bq, bv=bv)


def test_p12_one_map_for_rows_with_the_same_query_and_key() -> None:
    query, key, value = draw(1, 2, 12, D), draw(1, 2, 12, D), draw(3, 2, 12, D)

    def rewritten(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        wide = torch.cat(torch.chunk(value, 3, 0), -1)
        out = attention(query, key, wide, [], SCALED)[0]
        return torch.cat(torch.chunk(out, 3, -1), 0)

    repeated = query.repeat(3, 1, 1, 1) @ key.repeat(3, 1, 1, 1).mT
    check(rewritten, attend(repeated * SC, value), 1, query=query, key=key, value=value)


# -- P13 ------------------------------------------------------------------------------------------
def tree_weights(s: Tensor, block: int) -> Tensor:
    """Weights of two-level hierarchical attention: the gradient of the energy of the root."""
    s = s.detach().requires_grad_()
    blocks = s.shape[-1] // block
    tiles = s.unflatten(-1, (blocks, block)).unflatten(-3, (blocks, block))  # A, i, C, j
    own = tiles.diagonal(dim1=-4, dim2=-2)  # i, j, A
    local = own.logsumexp(-2).mean(-2)  # the energy of a block, from those of its leaves
    pooled = tiles.mean((-3, -1))
    eye = torch.eye(blocks, dtype=torch.bool)
    others = (block * pooled.exp()).masked_fill(eye, 0.0).sum(-1)
    energy = (local.exp() + others).log().mean(-1).sum()
    return torch.autograd.grad(energy, s)[0] * s.shape[-1]


def test_p13_hierarchical_attention() -> None:
    n, block = 32, 4
    query, key, value = qkv(2, n)
    theta = tree_weights(query @ key.mT * SC, block)
    assert_equal(theta.sum(-1), torch.ones_like(theta.sum(-1)))
    same = q.eq(k)
    pooled = spec(
        logits=E.where(same, E.load("local"), E.score * SC + math.log(block)),
        weights=E.where(same, 0.0, E.weight))

    def rewritten(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = [x.unflatten(2, (n // block, block)) for x in (query, key, value)]
        inside, lse = attention(*parts, [], SCALED)
        local = lse.mean(-1)
        means = [x.mean(3) for x in parts]
        outside, total = attention(*means, [local.unsqueeze(-1)], pooled)
        share = (local - total).exp().unsqueeze(-1).unsqueeze(-1)
        return (inside * share + outside.unsqueeze(3)).flatten(2, 3)
    check(rewritten, theta @ value, 2, query=query, key=key, value=value)
