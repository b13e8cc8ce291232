"""Sliding windows of Hugging Face families: the exact number of keys, padding kept at run time.

A family keeps `q - k < W` (W keys, causal) or `|q - k| <= W // 2` (both ways, one key more); which
one is read from the mask that the model builds, in eager and in fused attention.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnopt

transformers = pytest.importorskip("transformers")
WINDOW, TOKENS = 6, 20
SMALL: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=128, pad_token_id=0, bos_token_id=1,
    eos_token_id=2)
GROUPED: dict[str, Any] = dict(num_key_value_heads=2, use_cache=False)
HALF = ["sliding_attention", "full_attention"]
CAUSAL = f"causal window {WINDOW}"
#: family -> (config class, model class, what its config adds, the masks of its layers)
FAMILIES: dict[str, tuple[str, str, dict[str, Any], list[str]]] = {
    "mistral": ("MistralConfig", "MistralModel", dict(GROUPED, sliding_window=WINDOW),
                [CAUSAL, CAUSAL]),
    "phi3": ("Phi3Config", "Phi3Model", dict(GROUPED, sliding_window=WINDOW), [CAUSAL, CAUSAL]),
    "qwen2": ("Qwen2Config", "Qwen2Model", dict(
        GROUPED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1,
        layer_types=HALF[::-1]), ["causal", CAUSAL]),
    "gemma3": ("Gemma3TextConfig", "Gemma3TextModel", dict(
        GROUPED, head_dim=8, sliding_window=WINDOW, layer_types=HALF), [CAUSAL, "causal"]),
    "gemma2": ("Gemma2Config", "Gemma2Model", dict(
        GROUPED, head_dim=8, sliding_window=WINDOW), [CAUSAL, "causal"]),
    "starcoder2": ("Starcoder2Config", "Starcoder2Model", dict(
        GROUPED, sliding_window=WINDOW), [CAUSAL, CAUSAL]),
    "modernbert": ("ModernBertConfig", "ModernBertModel", dict(
        local_attention=2 * WINDOW, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2),
        ["", f"window {2 * WINDOW + 1}"]),
}
CASES = [(family, attention) for family in FAMILIES for attention in ("eager", "sdpa")
         if (family, attention) != ("gemma2", "sdpa")]
QUICK = [("mistral", "sdpa"), ("modernbert", "eager")]


@functools.cache
def built(family: str, attention: str) -> nn.Module:
    config, model, more, _ = FAMILIES[family]
    torch.manual_seed(0)
    own = getattr(transformers, config)(**SMALL, **more)
    own._attn_implementation = attention
    return getattr(transformers, model)(own).eval()  # type: ignore[no-any-return]


def given(tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randint(3, 64, (2, tokens)), torch.ones(2, tokens, dtype=torch.long)


def padded(keep: Tensor) -> Tensor:
    """Left padding of one row, right padding of the other."""
    keep = keep.clone()
    keep[0, :7], keep[1, -4:] = 0, 0
    return keep


def each(quick: list[tuple[str, str]]) -> list[Any]:
    return [c if c in quick else pytest.param(*c, marks=pytest.mark.slow) for c in CASES]


@pytest.mark.parametrize("family,attention", each(QUICK))
def test_number_of_keys(family: str, attention: str) -> None:
    ids, _ = given()
    report = attnopt.explain(built(family, attention), (ids,), backend="aten")
    assert [site.mask for site in report.sites] == FAMILIES[family][3]


@pytest.mark.parametrize("family,attention", each(QUICK))
def test_padding_is_not_specialised(family: str, attention: str,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnopt.passes.rules.cost.TAKE_ALL", True)
    model = built(family, attention)
    ids, keep = given()
    opt = attnopt.optimize(model, (ids,), {"attention_mask": keep}, backend="aten")
    for site, mask in zip(opt.report.sites, FAMILIES[family][3], strict=True):
        assert site.mask == f"index & input: {mask}{' & ' if mask else ''}padding"
    for mask in (keep, padded(keep)):
        with torch.no_grad():
            wanted = model(ids, attention_mask=mask).last_hidden_state[mask.bool()]
            got = opt(ids, attention_mask=mask).last_hidden_state[mask.bool()]
        assert torch.allclose(got, wanted, atol=2e-5)
    rows = [opt(ids, attention_mask=m).last_hidden_state[0, 8] for m in (keep, padded(keep))]
    assert not torch.allclose(*rows, atol=1e-4)


LONGER = [("mistral", "sdpa")]


@pytest.mark.parametrize("family,attention", each(LONGER))
def test_other_lengths(family: str, attention: str) -> None:
    """One capture with symbolic lengths: the same words, and every length is served."""
    model = built(family, attention)
    ids, keep = given()
    auto = torch.export.Dim.DYNAMIC
    moving = {"input_ids": {0: auto, 1: auto}, "attention_mask": {0: auto, 1: auto}}
    opt = attnopt.optimize(model, (), {"input_ids": ids, "attention_mask": keep}, backend="aten",
                           dynamic_shapes=moving)
    masks = [f"index & input: {m}{' & ' if m else ''}padding" for m in FAMILIES[family][3]]
    assert [site.mask for site in opt.report.sites] == masks
    for tokens in (9, 33):
        ids, keep = given(tokens)
        keep = padded(keep)
        with torch.no_grad():
            wanted = model(input_ids=ids, attention_mask=keep).last_hidden_state[keep.bool()]
            got = opt(input_ids=ids, attention_mask=keep).last_hidden_state[keep.bool()]
        assert torch.allclose(got, wanted, atol=2e-5)
    assert len(opt.report.sites) == len(masks)


def test_packed_documents_are_segments() -> None:
    """Positions that start over mark documents; where they do is known at run time only, and so
    is what is causal, as the model compares positions."""
    model = built("mistral", "sdpa")
    ids, _ = given()
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None].expand(2, -1).contiguous()
    opt = attnopt.optimize(model, (ids,), {"position_ids": positions}, backend="aten")
    for site in opt.report.sites:
        assert "segments" in site.mask and "input" in site.mask
    other = torch.cat([torch.arange(3), torch.arange(17)])[None].expand(2, -1).contiguous()
    for given_positions in (positions, other):
        with torch.no_grad():
            wanted = model(ids, position_ids=given_positions).last_hidden_state
            got = opt(ids, position_ids=given_positions).last_hidden_state
        assert torch.allclose(got, wanted, atol=2e-5)
