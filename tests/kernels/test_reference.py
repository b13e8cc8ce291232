"""The float64 reference: every field of a Spec against plain torch, shapes, and bad input."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attnopt.ir import expr as E
from attnopt.ir.mask import Causal, KeyKeep, Mask, Where
from attnopt.ir.spec import Operand, Spec
from attnopt.kernels import reference

q, k = E.index("q"), E.index("k")
PAD = (Operand("pad", ("b", "k"), E.BOOL, "mask"),)
TRIL = torch.ones(5, 7).tril().bool()


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3), (2, 1, 3, 2), (0, 3)])
def test_any_number_of_leading_axes(leading: tuple[int, ...]) -> None:
    query, key, value = draw(*leading, 5, 4), draw(*leading, 7, 4), draw(*leading, 7, 6)
    out, lse, weights = reference(Spec(logits=E.score * 0.5))(
        query, key, value, with_lse=True, with_weights=True)
    x = query @ key.mT * 0.5
    close(weights, x.softmax(-1))
    close(out, x.softmax(-1) @ value)
    close(lse, x.logsumexp(-1))
    assert out.shape == (*leading, 5, 6) and lse.shape == (*leading, 5)


def test_sdpa_is_one_spec() -> None:
    query, key, value, bias = draw(2, 4, 5, 8), draw(2, 4, 7, 8), draw(2, 4, 7, 6), draw(4, 5, 7)
    spec = Spec(logits=E.score * 8**-0.5 + E.load("bias"),
                operands=(Operand("bias", ("h", "q", "k")),))
    expected = F.scaled_dot_product_attention(query, key, value, bias)
    close(reference(spec)(query, key, value, [bias]), expected)
    close(reference(spec)(query, key, value, {"bias": bias}), expected)
    causal = reference(Spec(logits=E.score * 8**-0.5, mask=Causal()))(query, key, value)
    close(causal, F.scaled_dot_product_attention(query, key, value, is_causal=True))


def test_grouped_queries_broadcast() -> None:
    query, key, value = draw(2, 6, 5, 4), draw(2, 2, 7, 4), draw(2, 2, 7, 4)
    out = reference(Spec(logits=E.score * 0.5))(
        query.unflatten(1, (2, 3)), key.unsqueeze(2), value.unsqueeze(2)).flatten(1, 2)
    close(out, F.scaled_dot_product_attention(query, key, value, enable_gqa=True))


@pytest.mark.parametrize(("score", "raw"), [
    ("dot", lambda query, key: query @ key.mT),
    ("distance", lambda query, key: ((query[..., None, :] - key[..., None, :, :]) ** 2).sum(-1)),
    ("key", lambda query, key: query.new_zeros(2, 3, 5, 7)),
])
def test_scores(score: str, raw) -> None:  # type: ignore[no-untyped-def]
    query, key, value, more = draw(2, 3, 5, 4), draw(2, 3, 7, 4), draw(2, 3, 7, 4), draw(2, 1, 1, 7)
    spec = Spec(score=score, logits=E.score * -0.5 + E.load("more"),
                operands=(Operand("more", ("b", "k")),))
    expected = (-0.5 * raw(query, key) + more).softmax(-1) @ value
    close(reference(spec)(query, key, value, [more]), expected)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_additive_scores(shape: tuple[int, ...]) -> None:
    query, key, value, weight = draw(2, 3, 5, 4), draw(2, 3, 7, 4), draw(2, 3, 7, 4), draw(*shape)
    wide = weight.expand(2, 3, 4)[:, :, None, None]
    x = (torch.tanh(query[..., None, :] + key[..., None, :, :]) * wide).sum(-1)
    spec = Spec(score="additive", operands=(Operand("score_weight", None),))
    close(reference(spec)(query, key, value, [weight]), x.softmax(-1) @ value)


# -- rows without a key -------------------------------------------------------------------------
@pytest.mark.parametrize(("empty_row", "fill"), [("nan", torch.nan), ("zero", 0.0),
                                                 ("uniform", 1 / 7)])
def test_rows_without_a_key(empty_row: str, fill: float) -> None:
    query, key, value = (draw(2, 1, n, 4).requires_grad_() for n in (5, 7, 7))
    pad = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    pad[1] = False
    spec = Spec(mask=KeyKeep("pad"), empty_row=empty_row, operands=PAD)
    out, lse, weights = reference(spec)(query, key, value, [pad], with_lse=True, with_weights=True)
    close(weights[1], torch.full((1, 5, 7), fill, dtype=torch.float64))
    close(out[0], (query[0] @ key[0].mT).softmax(-1) @ value[0])
    close(out[1], (torch.full((1, 5, 7), fill, dtype=torch.float64) @ value[1]))
    assert torch.isneginf(lse[1]).all() and torch.isfinite(lse[0]).all()
    grads = torch.autograd.grad(out[0].sum() + out[1].nan_to_num().sum(), [query, key])
    assert all(torch.isfinite(g).all() for g in grads)


def test_uniform_rows_are_what_a_large_negative_fill_gives() -> None:
    query, key, value = draw(2, 1, 5, 4), draw(2, 1, 7, 4), draw(2, 1, 7, 4)
    pad = torch.rand(2, 1, 1, 7) < 0.5
    pad[1] = False
    x = (query @ key.mT).masked_fill(~pad, torch.finfo(torch.float64).min)
    spec = Spec(mask=KeyKeep("pad"), empty_row="uniform", operands=PAD)
    close(reference(spec)(query, key, value, [pad]), x.softmax(-1) @ value)


def test_with_a_sink_a_row_without_a_key_is_zero() -> None:
    query, key, value = draw(3, 5, 4), draw(3, 7, 4), draw(3, 7, 4)
    spec = Spec(sinks=E.load("sink"), mask=Where(q > k), operands=(Operand("sink", ("h",)),))
    out, lse = reference(spec)(query, key, value, [draw(3, 1, 1)], with_lse=True)
    assert (out[:, 0] == 0).all() and torch.isfinite(lse).all() and torch.isfinite(out).all()


def test_no_keys_at_all() -> None:
    for empty_row in ("nan", "zero", "uniform"):
        out, lse = reference(Spec(empty_row=empty_row))(
            draw(2, 5, 4), draw(2, 0, 4), draw(2, 0, 3), with_lse=True)
        assert torch.equal(out, torch.zeros(2, 5, 3, dtype=torch.float64))
        assert torch.isneginf(lse).all()


# -- normalisers, statistics, epilogues -----------------------------------------------------------
@pytest.mark.parametrize(("name", "function"), [
    ("sigmoid", torch.sigmoid), ("relu", torch.relu), ("exp", torch.exp), ("identity", lambda x: x),
    ("softplus", lambda x: torch.logaddexp(x, torch.zeros_like(x)))])
@pytest.mark.parametrize("l1", [False, True])
def test_other_normalisers(name: str, function, l1: bool) -> None:  # type: ignore[no-untyped-def]
    query, key, value = draw(3, 5, 4), draw(3, 7, 4), draw(3, 7, 4)
    weights = function(query @ key.mT) * TRIL
    if l1:
        weights = weights / weights.sum(-1, keepdim=True)
    spec = Spec(normalizer=name, l1=l1, mask=Causal())
    close(reference(spec)(query, key, value), weights @ value)


@pytest.mark.parametrize("mask", [Causal(), Where(k <= q + 1)])
def test_statistics(mask: Mask) -> None:
    query, key, value = draw(2, 3, 5, 4), draw(2, 3, 7, 4), draw(2, 3, 7, 4)
    keep = mask.to_dense(5, 7)
    x = (query @ key.mT).masked_fill(~keep, -torch.inf)
    w = x.softmax(-1)
    group = torch.arange(7) % 2
    expected = {
        "max": x.amax(-1), "sum": x.exp().sum(-1), "lse": x.logsumexp(-1), "count": keep.sum(-1),
        "mass:1": w[..., group == 1].sum(-1), "mass:5": torch.zeros(2, 3, 5),
        "total": 2 * w.sum(-1)}
    for name, row in expected.items():
        spec = Spec(mask=mask, groups=k % 2, weights=E.weight * 2.0,
                    output=E.out * 0.0 + E.stat(name))
        found = reference(spec)(query, key, value)
        close(found, row.double()[..., None].expand(2, 3, 5, 4))


def test_weights_are_edited_then_mixed_then_dropped() -> None:
    query, key, value, mix = draw(2, 3, 5, 4), draw(2, 3, 7, 4), draw(2, 6, 7, 4), draw(6, 3)
    spec = Spec(weights=E.where(k < 2, 0.0, E.weight), renormalize=True, mix_weights="mix",
                dropout=0.3, operands=(Operand("mix", None, role="mix"),))
    w = (query @ key.mT).softmax(-1)
    w[..., :2] = 0.0
    w = torch.einsum("gh,bhqk->bgqk", mix, w / w.sum(-1, keepdim=True))
    torch.manual_seed(3)
    expected = F.dropout(w, 0.3) @ value
    torch.manual_seed(3)
    close(reference(spec)(query, key, value, [mix]), expected)


def test_output_epilogue_sees_columns_value_and_sizes() -> None:
    query, key, value, gate = draw(2, 3, 7, 4), draw(2, 3, 7, 4), draw(2, 3, 7, 6), draw(3, 1, 1)
    spec = Spec(output=E.out * E.load("gate") + E.value / E.size("k") + E.index("d") * q,
                operands=(Operand("gate", ("h",), role="gate"),))
    columns = torch.arange(6) * torch.arange(7)[:, None]
    expected = (query @ key.mT).softmax(-1) @ value * gate + value / 7 + columns
    close(reference(spec)(query, key, value, [gate]), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_softmax_may_be_wider_than_the_inputs(dtype: torch.dtype) -> None:
    query, key, value = (draw(3, 5, 4).to(dtype) for _ in range(3))
    found = reference(Spec(compute="float32"))(query, key, value)
    expected = (query @ key.mT).softmax(-1, dtype=torch.float32).to(dtype) @ value
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected)
    wide = reference(Spec(compute="float32"))(query.double(), key.double(), value.double())
    close(wide, reference(Spec())(query.double(), key.double(), value.double()))


def test_gradients_are_those_of_the_formula() -> None:
    inputs = [draw(2, n, 4).requires_grad_() for n in (5, 7, 7)]
    bias = draw(2, 5, 7).requires_grad_()
    spec = Spec(logits=E.call("tanh", E.score * 0.5 + E.load("bias")) * 3.0, mask=Causal(),
                operands=(Operand("bias", ("h", "q", "k")),))
    assert torch.autograd.gradcheck(lambda *x: reference(spec)(*x[:3], [x[3]]), (*inputs, bias))


@pytest.mark.parametrize(("spec", "operands", "message"), [
    (Spec(mask=KeyKeep("pad"), operands=PAD), [], "operands must be 1, got 0"),
    (Spec(mask=KeyKeep("pad"), operands=PAD), {}, "every slot, got no .'pad'."),
    (Spec(weights=E.weight * E.stat("mass:1")), [], "groups must be set for .'@mass:1'."),
    (Spec(logits=E.weight), [], "weight has no value here"),
    (Spec(logits=E.score * E.index("b1")), [], "axis must be one of"),
])
def test_bad_input_is_named(spec: Spec, operands: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reference(spec)(draw(3, 5, 4), draw(3, 7, 4), draw(3, 7, 4), operands)
