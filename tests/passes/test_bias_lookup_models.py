"""Published models whose relative positions meet the query or the key: the report names the form,
and the outputs are those of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnopt
from attnopt.ir.spec import Spec

QUERY, KEY = "query table by relative position", "key table by relative position"
pytestmark = [pytest.mark.usefixtures("by_aten"), pytest.mark.slow]

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
                         "intermediate_size": 48}
SPEECH: dict[str, Any] = {
    **SIZES, "conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 3),
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2}
TEXT: dict[str, Any] = {**SIZES, "vocab_size": 99, "max_position_embeddings": 64}
DEBERTA: dict[str, Any] = {
    **TEXT, "relative_attention": True, "max_relative_positions": -1, "type_vocab_size": 0,
    "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
#: model, its configuration, and what the report says
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "Deberta": (DEBERTA, f"{QUERY}, shift & {KEY}, shift"),
    "DebertaV2": ({**DEBERTA, "position_buckets": 16, "norm_rel_ebd": "layer_norm",
                   "share_att_key": True}, f"{QUERY}, buckets & {KEY}, buckets"),
    "XLNet": ({"vocab_size": 99, "d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48},
              f"{QUERY}, shift"),
    "MPNet": (TEXT, "table by distance, 1-D"),
    "WavLM": ({**SPEECH, "num_buckets": 32, "max_bucket_distance": 80}, "table by distance, 1-D"),
    "Wav2Vec2Conformer": ({**SPEECH, "position_embeddings_type": "relative",
                           "max_source_positions": 200}, f"{QUERY}, shift"),
    "Wav2Vec2Bert": ({**SIZES, "feature_projection_input_dim": 20,
                      "position_embeddings_type": "relative_key",
                      "left_max_position_embeddings": 13, "right_max_position_embeddings": 4,
                      "conv_depthwise_kernel_size": 5}, f"{QUERY}, buckets"),
}


@pytest.mark.parametrize("name", MODELS)
def test_published_models(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes, words = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(
        getattr(transformers, f"{name}Config")(**sizes)).eval()
    inputs: dict[str, Tensor] = {"input_ids": torch.randint(3, 90, (2, 40))}
    if sizes.keys() >= SPEECH.keys():
        inputs = {"input_values": torch.randn(1, 400)}
    elif "feature_projection_input_dim" in sizes:
        inputs = {"input_features": torch.randn(2, 40, 20)}
    opt = attnopt.optimize(model, (), inputs, verify=False)
    with torch.no_grad():
        torch.testing.assert_close(opt(**inputs)[0], model(**inputs)[0], atol=5e-6, rtol=1e-5)
    (site,) = opt.report.sites
    assert site.status == "rewritten" and words in site.bias, (site.bias, site.reason)
    assert not [o for o in Spec.parse(site.spec).operands if {"q", "k"} <= set(o.axes or ())]


@pytest.mark.parametrize("name", MODELS)
def test_published_models_of_any_length(name: str) -> None:
    """Lengths that are symbols, and quotients of symbols behind strided convolutions. DeBERTa reads
    its span out of a tensor."""
    transformers = pytest.importorskip("transformers")
    sizes, words = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(
        getattr(transformers, f"{name}Config")(**sizes)).eval()

    def drawn(batch: int, length: int) -> dict[str, Tensor]:
        if sizes.keys() >= SPEECH.keys():
            return {"input_values": torch.randn(batch, 10 * length)}
        if "feature_projection_input_dim" in sizes:
            return {"input_features": torch.randn(batch, length, 20)}
        return {"input_ids": torch.randint(3, 90, (batch, length))}

    inputs = drawn(2, 40)
    some = torch.export.Dim.AUTO
    opt = attnopt.optimize(model, (), inputs, verify=False,
                           dynamic_shapes={key: {0: some, 1: some} for key in inputs})
    for given in (inputs, drawn(3, 57), drawn(2, 17), drawn(2, 9)):
        with torch.no_grad():
            torch.testing.assert_close(opt(**given)[0], model(**given)[0], atol=5e-6, rtol=1e-5)
    (site,) = opt.report.sites
    assert site.status == "rewritten" and words in site.bias, (site.bias, site.reason)
    assert not [o for o in Spec.parse(site.spec).operands if {"q", "k"} <= set(o.axes or ())]
    assert not any(n for kind, n in opt.report.calls.items() if kind != "hits"), opt.report.calls
