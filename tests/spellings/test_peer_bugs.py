"""Two results that other optimisers get wrong, silently (reference/peers.md 0.3 and 0.4).

The softcap of Gemma 2 is dropped when a model is switched to fused attention; and a matcher whose
patterns ignore the axes of a permutation takes one permuted K for another when sizes coincide.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnopt
from tests.spellings.checking import describe, differences, oracle, run, taken


class SoftcappedAttention(nn.Module):
    """Grouped heads, softcap, mask, float32 softmax: as Gemma 2 writes it."""

    def __init__(self, cap: float | None) -> None:
        super().__init__()
        self.cap = cap
        self.q = nn.Linear(32, 32, bias=False)
        self.kv = nn.Linear(32, 32, bias=False)
        self.out = nn.Linear(32, 32, bias=False)

    def forward(self, x, mask):
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, 4, 8).transpose(1, 2)
        k, v = self.kv(x).view(batch, length, 2, 2, 8).permute(2, 0, 3, 1, 4)
        k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for t in (k, v))
        scores = torch.matmul(q, k.transpose(2, 3)) * 8**-0.5
        if self.cap is not None:
            scores = torch.tanh(scores / self.cap) * self.cap
        scores = scores + mask
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        out = torch.matmul(weights, v).transpose(1, 2).reshape(batch, length, -1)
        return self.out(out)


def assert_right(opt: nn.Module, original: nn.Module, *inputs: torch.Tensor) -> None:
    for gradients in (False, True):
        exact = oracle(original, inputs, gradients=gradients)
        expected = run(original, inputs, gradients=gradients)
        wrong = differences(run(opt, inputs, gradients=gradients), expected, exact)
        assert not wrong, f"{wrong}; {describe(opt)}"


def causal(length: int) -> torch.Tensor:
    return torch.full((1, 1, length, length), -torch.inf).triu(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softcap_is_kept(dtype: torch.dtype) -> None:
    model = SoftcappedAttention(cap=0.05).to(dtype)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.5)
    x, mask = torch.randn(2, 12, 32).to(dtype), causal(12).to(dtype)

    uncapped = copy.deepcopy(model)
    uncapped.cap = None
    assert (uncapped(x, mask) - model(x, mask)).abs().max() > 0.1  # the cap is felt here

    opt = attnopt.optimize(copy.deepcopy(model), (x, mask), verify=False)
    assert len(taken(opt)) == 1, describe(opt)
    assert_right(opt, model, x, mask)


def test_softcap_of_gemma2_is_kept() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, attn_logit_softcapping=0.05,
        query_pre_attn_scalar=8, sliding_window=6, max_position_embeddings=64,
        attn_implementation="eager", use_cache=False,
    )
    model = transformers.Gemma2Model(config).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    ids = torch.randint(0, 64, (2, 12))

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model(input_ids=input_ids).last_hidden_state

    original = Hidden().eval()
    opt = attnopt.optimize(copy.deepcopy(original), (ids,), verify=False)
    assert len(taken(opt)) == 2, describe(opt)
    assert_right(opt, original, ids)


# -- the axes of a permuted K ---------------------------------------------------------------------
class StoredBySequence(nn.Module):
    """q, k, v as (B, S, H, D): `k.permute(0, 2, 3, 1)` is K transposed."""

    def forward(self, q, k, v):
        q, v = q.permute(0, 2, 1, 3), v.permute(0, 2, 1, 3)
        return ((q @ k.permute(0, 2, 3, 1)) / 4.0).softmax(-1) @ v


class StoredByHead(nn.Module):
    """q, v as (B, H, S, D) and k the same: the permutation makes heads of tokens.

    Legal only where S == H; then K's tokens are the batch axis and its heads are what is attended.
    """

    def forward(self, q, k, v):
        return ((q @ k.permute(0, 2, 3, 1)) / 4.0).softmax(-1) @ v


class MixedStorage(nn.Module):
    """q and v as (B, H, S, D), k as (B, S, H, D)."""

    def forward(self, q, k, v):
        return ((q @ k.permute(0, 2, 3, 1)) / 4.0).softmax(-1) @ v


class TwicePermuted(nn.Module):
    """The same tensor reached by two permutations, one of which a wildcard would mistake."""

    def forward(self, q, k, v):
        keys = k.permute(0, 2, 1, 3).permute(0, 1, 3, 2)
        return ((q.permute(0, 2, 1, 3) @ keys) / 4.0).softmax(-1) @ v.transpose(1, 2)


def shaped(*axes: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(*axes) for _ in range(3))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("length", [4, 7])
@pytest.mark.parametrize("model", [StoredBySequence(), TwicePermuted()],
                         ids=lambda m: type(m).__name__)
def test_permuted_key_by_sequence(model: nn.Module, batch: int, length: int) -> None:
    inputs = shaped(batch, length, 4, 16)
    opt = attnopt.optimize(copy.deepcopy(model), inputs, verify=False)
    assert len(taken(opt)) == 1, describe(opt)
    assert_right(opt, model, *inputs)
    q, k, v = (x.transpose(1, 2) for x in inputs)
    assert torch.allclose(opt(*inputs), F.scaled_dot_product_attention(q, k, v), atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("length", [4, 7])
def test_permuted_key_mixed(batch: int, length: int) -> None:
    q, _, v = shaped(batch, 4, length, 16)
    k = torch.randn(batch, length, 4, 16)
    opt = attnopt.optimize(MixedStorage(), (q, k, v), verify=False)
    assert len(taken(opt)) == 1, describe(opt)
    assert_right(opt, MixedStorage(), q, k, v)
    expected = F.scaled_dot_product_attention(q, k.transpose(1, 2), v)
    assert torch.allclose(opt(q, k, v), expected, atol=1e-5)


@pytest.mark.parametrize("size", [16, 4])
@pytest.mark.parametrize("batch", [1, 2])
def test_permuted_key_by_head(batch: int, size: int) -> None:
    inputs = shaped(batch, 4, 4, size)
    model = StoredByHead()
    opt = attnopt.optimize(copy.deepcopy(model), inputs, verify=False)
    assert_right(opt, model, *inputs)
    straight = F.scaled_dot_product_attention(*inputs, scale=0.25)
    assert not torch.allclose(opt(*inputs), straight, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_permuted_key_dynamic(dtype: torch.dtype) -> None:
    auto = torch.export.Dim.AUTO
    inputs = tuple(x.to(dtype) for x in shaped(2, 4, 4, 16))
    model = StoredBySequence()
    opt = attnopt.optimize(copy.deepcopy(model), inputs, verify=False,
                           dynamic_shapes=({0: auto, 1: auto},) * 3)
    for length in (4, 9):
        assert_right(opt, model, *(x.to(dtype) for x in shaped(2, length, 4, 16)))
