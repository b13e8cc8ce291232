"""The chunked band of Hugging Face's Longformer and LED, as sliding-window attention over tokens.

Scores of overlapping chunks are taken by `as_strided`, diagonals become columns, the corners are
set to -inf in place, the padding of the keys comes as a second chunked product with ones, and the
weights of padded queries are set to 0.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import attnopt
from attnopt.passes.rules import blocks, cost, sdpa
from tests.spellings.checking import describe, differences, oracle, run

transformers = pytest.importorskip("transformers")
WIDE, HIDDEN, HEADS = 8, 32, 2


@pytest.fixture(autouse=True)
def _taken(monkeypatch: pytest.MonkeyPatch, by_aten: None) -> None:
    monkeypatch.setattr(cost, "pays", lambda region: None)
    for rule in (blocks, sdpa):
        monkeypatch.setattr(rule, "local", lambda region: None)
        monkeypatch.setattr(rule, "pays", lambda region: None)


class Chunked(nn.Module):
    """Self attention of a layer, without global tokens."""

    def __init__(self, led: bool) -> None:
        super().__init__()
        if led:
            from transformers.models.led.modeling_led import LEDEncoderSelfAttention as Attention

            config = transformers.LEDConfig(
                d_model=HIDDEN, encoder_attention_heads=HEADS, attention_window=[2 * WIDE],
                attention_probs_dropout_prob=0.0)
        else:
            from transformers.models.longformer.modeling_longformer import (
                LongformerSelfAttention as Attention,
            )
            config = transformers.LongformerConfig(
                hidden_size=HIDDEN, num_attention_heads=HEADS, attention_window=[2 * WIDE],
                attention_probs_dropout_prob=0.0)
        self.attention = Attention(config, 0)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.attention(x, attention_mask=mask, is_index_masked=mask < 0,
                              is_index_global_attn=None, is_global_attn=False)[0]


def inputs(lengths: list[int], tokens: int = 6 * WIDE) -> list[Tensor]:
    keep = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    return [torch.randn(len(lengths), tokens, HIDDEN), torch.where(keep, 0.0, -10000.0)]


@pytest.mark.parametrize("led", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_chunked_band_is_a_sliding_window(led: bool) -> None:
    torch.manual_seed(0)
    original = Chunked(led).eval()
    with torch.no_grad():
        opt = attnopt.optimize(copy.deepcopy(original), tuple(inputs([6 * WIDE, 20])))
        (site,) = opt.report.sites
        assert site.status == "rewritten", describe(opt)
        assert site.mask.startswith(f"window {2 * WIDE + 1} cropped at the borders"), site.mask
        for lengths in ([6 * WIDE, 20], [5, 3 * WIDE], [6 * WIDE, 0]):  # another mask, another sum
            given = inputs(lengths)
            assert not differences(
                run(opt, given, gradients=False), run(original, given, gradients=False),
                oracle(original, given, gradients=False)), (lengths, describe(opt))


@pytest.mark.slow
def test_big_bird_takes_its_first_and_last_blocks() -> None:
    """Of five softmaxes four have all their keys in one product. The one of the blocks between
    meets window, random and global values in products of their own, and is kept with this reason.
    """
    torch.manual_seed(0)
    config = transformers.BigBirdConfig(
        hidden_size=HIDDEN, num_attention_heads=HEADS, num_hidden_layers=1, intermediate_size=32,
        vocab_size=99, block_size=8, num_random_blocks=2, max_position_embeddings=128,
        attention_type="block_sparse")
    original = transformers.BigBirdModel(config, add_pooling_layer=False).eval()
    tokens, keep = torch.randint(3, 99, (2, 128)), torch.arange(128) < torch.tensor([[128], [50]])
    given = {"input_ids": tokens, "attention_mask": keep.long()}
    with torch.no_grad():
        opt = attnopt.optimize(copy.deepcopy(original), (), given)
        assert [s.status for s in opt.report.sites].count("rewritten") == 4, describe(opt)
        (kept,) = (s for s in opt.report.sites if s.status == "kept")
        assert "only a part of the keys of the softmax meets these values" in kept.reason
        torch.testing.assert_close(opt(**given)[0], original(**given)[0], rtol=1e-4, atol=1e-5)
