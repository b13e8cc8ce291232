"""The tiled lowering against the float64 oracle, and programs that hold nothing but ATen."""

from __future__ import annotations

import pytest
import torch

from attnopt.ir import expr as E
from attnopt.ir.mask import ALL, Band, Causal, KeyKeep, Neighborhood, Windows
from attnopt.ir.spec import Operand, Spec
from attnopt.kernels import reference
from attnopt.kernels.aten.tiled import band_of, tiled, tiled_reasons, tiles_of
from attnopt.kernels.portable import form_of

Q, K = E.index("q"), E.index("k")
KEEP = Operand("keep", ("b", "k"), E.BOOL, "mask")
SLOPE = Operand("slope", None, E.FLOAT, "table")
BIAS = Operand("bias", ("h", "q", "k"), E.FLOAT, "bias")


def _inputs(spec, heads, queries, keys, dim, kv_heads=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(2, h, n, dim, generator=generator) for h, n in (
        (heads, queries), (kv_heads or heads, keys), (kv_heads or heads, keys))]
    shapes = {"keep": lambda: torch.rand(2, 1, 1, keys, generator=generator) > 0.2,
              "slope": lambda: torch.rand(heads, generator=generator),
              "bias": lambda: torch.randn(heads, queries, keys, generator=generator)}
    return made, [shapes[o.slot]() for o in spec.operands]


SPECS = {
    "causal window": (Spec(logits=E.score * 0.3, mask=Band(-40, 0)), 3, 301),
    "window both ways": (Spec(logits=E.score * 0.3, mask=Band(-9, 20)), 1, 257),
    "neighbourhood": (Spec(mask=Neighborhood((5, 5), (1, 1), (1, 1), (False, False),
                                             (18, 20))), 2, 360),
    "dilated": (Spec(mask=Neighborhood((3, 5), (1, 1), (2, 3), (False, False), (18, 20))), 2, 360),
    "3-D": (Spec(mask=Neighborhood((3, 3, 3), (1,) * 3, (1,) * 3, (False,) * 3, (6, 8, 9))),
            1, 432),
    "partition": (Spec(mask=Windows((6, 5), (18, 20))), 2, 360),
    "slopes": (Spec(logits=E.score * 0.3 + E.load("slope", E.index("h")) * E.call("float", K - Q),
                    mask=Band(-40, 0), operands=(SLOPE,)), 3, 301),
    "dense bias": (Spec(logits=E.score * 0.3 + E.load("bias"), mask=Band(-40, 0),
                        operands=(BIAS,)), 3, 301),
    "padding": (Spec(logits=E.score * 0.3, empty_row="zero",
                     mask=Band(-40, 0) & KeyKeep("keep"),
                     operands=(KEEP,)), 2, 301),
    "softcap": (Spec(logits=E.call("tanh", E.score * 0.1) * 5.0, mask=Band(-40, 0)), 2, 301),
    "sigmoid": (Spec(normalizer="sigmoid", mask=Band(-40, 0)), 2, 301),
    "distance": (Spec(score="distance", logits=E.score * -0.1, mask=Band(-40, 0)), 2, 301),
}


@pytest.mark.parametrize("name", SPECS)
def test_equals_the_oracle(name):
    spec, heads, n = SPECS[name]
    assert not tiled_reasons(spec)
    tensors, operands = _inputs(spec, heads, n, n, 8)
    expected = reference(spec)(*(t.double() for t in tensors), [
        o.double() if o.is_floating_point() else o for o in operands])
    expected = expected[0] if isinstance(expected, tuple) else expected
    tiles = tiles_of(spec.mask, n, n)
    assert tiles is not None and tiles.scores < 0.6 * n * n
    found = tiled(spec, *tensors, operands, tiles)
    assert found.is_contiguous() and found.dtype == tensors[0].dtype
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    if band_of(spec.mask):
        found = tiled(spec, *tensors, operands, None)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 64, 100])
def test_short_and_ragged_bands(n):
    spec = Spec(mask=Band(-6, 3))
    tensors, _ = _inputs(spec, 2, n, n, 4)
    expected = reference(spec)(*(t.double() for t in tensors), [])
    expected = expected[0] if isinstance(expected, tuple) else expected
    found = tiled(spec, *tensors, [], None)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_shared_heads_other_lengths_and_gradients():
    spec = Spec(mask=Band(-20, 0))
    (q, k, v), _ = _inputs(spec, 4, 200, 260, 8, kv_heads=1)
    tensors = [t.requires_grad_() for t in (q, k, v)]
    tiles = tiles_of(spec.mask, 200, 260)
    out = tiled(spec, *tensors, [], tiles)
    grads = torch.autograd.grad(out.square().sum(), tensors)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    keep = spec.mask.to_dense(200, 260)
    dense = (exact[0] @ exact[1].transpose(-1, -2)).masked_fill(~keep, -torch.inf)
    expected = torch.autograd.grad((dense.softmax(-1) @ exact[2]).square().sum(), exact)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_half_precision():
    spec = Spec(logits=E.score * 0.3, mask=Band(-40, 0))
    tensors, _ = _inputs(spec, 2, 301, 301, 8)
    half = [t.bfloat16() for t in tensors]
    expected = reference(spec)(*(t.double() for t in half), [])
    expected = expected[0] if isinstance(expected, tuple) else expected
    found = tiled(spec, *half, [], tiles_of(spec.mask, 301, 301))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("spec", "words"), [
    (Spec(), "the mask must hide something"),
    (Spec(mask=Band(-4, 0), weights=E.weight * 2.0), "weights must be"),
    (Spec(score="key", logits=E.score, mask=Band(-4, 0)), "score must be"),
    (Spec(mask=Band(-4, -2), empty_row="uniform"), "a row without keys"),
])
def test_declines(spec, words):
    assert any(words in reason for reason in tiled_reasons(spec))


def test_which_form():
    shape = (1, 4, 4096, 64)
    assert form_of(Spec(mask=Band(-255, 0)), shape, shape) == "tiled"
    assert form_of(Spec(mask=Causal()), shape, shape) == "fused"
    assert form_of(Spec(mask=ALL), shape, shape) == "fused"
    assert form_of(Spec(normalizer="sigmoid"), shape, shape) == "dense"
    assert form_of(Spec(mask=Band(-4000, 0)), shape, shape) == "fused"
