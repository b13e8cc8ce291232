"""Models of pictures with text, and open-vocabulary detection."""

from __future__ import annotations

from typing import Any

import torch

from tests.models.vision import _STAGES, _SWIN_4
from tests.models.zoo import (
    GQA,
    TEXT,
    VISION,
    VOCAB,
    Entry,
    Floats,
    Ints,
    Padding,
    Uniform,
    draw,
    ids,
)

_TXT = {**TEXT, "projection_dim": 16}
_IMG = {**VISION, "projection_dim": 16}
_PIX = Floats((2, 3, 32, 32))


def _image_tokens(count: int) -> torch.Tensor:
    """Ids of a row of 24 tokens, `count` of which stand for patches."""
    row = torch.arange(24) % 90 + 5
    row[2 : 2 + count] = 4
    return row.expand(2, -1).contiguous()


def _entry(name: str, config: str, over: dict[str, Any], model: str, make: Any) -> Entry:
    return Entry(name, config, over, model, make, "multimodal")


def _pair(name: str, prefix: str, text: dict[str, Any] = _TXT, image: dict[str, Any] = _IMG,
          make: Any = None,
          **over: Any) -> Entry:
    config = {"text_config": text, "vision_config": image, "projection_dim": 16, **over}
    return _entry(name, f"{prefix}Config", config, f"{prefix}Model", make or ids(pixel_values=_PIX))


ENTRIES: list[Entry] = [
    _entry("clip_text", "CLIPTextConfig", _TXT, "CLIPTextModel", ids()),
    _pair("clip", "CLIP"),
    _pair("siglip", "Siglip", make=ids(pixel_values=_PIX)),
    _pair("chinese_clip", "ChineseCLIP"),
    _pair("altclip", "AltCLIP", text={**_TXT, "project_dim": 16}),
    _pair("blip", "Blip"),
    _pair("groupvit", "GroupViT", image={**VISION, "depths": [1, 1, 1],
                                         "num_group_tokens": [8, 4, 0],
                                         "num_output_groups": [8, 4, 0]},
                                         projection_intermediate_dim=32),
    _pair("clipseg", "CLIPSeg"),
    _pair("owlvit", "OwlViT"),
    _entry("flava", "FlavaConfig",
           {"text_config": TEXT, "image_config": VISION, "multimodal_config": TEXT,
            "hidden_size": 32, "projection_dim": 16}, "FlavaModel", ids(pixel_values=_PIX)),
    _entry("vilt", "ViltConfig", {**TEXT, **VISION, "max_image_length": -1}, "ViltModel",
           ids(pixel_values=_PIX, pixel_mask=Ints((2, 32, 32), 1, 2))),
    _entry("lxmert", "LxmertConfig", {**TEXT, "l_layers": 1, "x_layers": 2, "r_layers": 1,
                                      "visual_feat_dim": 16,
                                      "num_hidden_layers": {"vision": 1, "language": 1,
                                                            "cross_encoder": 2}},
           "LxmertModel", ids(visual_feats=Floats((2, 5, 16)), visual_pos=Floats((2, 5, 4)))),
    _entry("visual_bert", "VisualBertConfig", {**TEXT, "visual_embedding_dim": 16},
           "VisualBertModel",
           ids(visual_embeds=Floats((2, 5, 16)), visual_attention_mask=Padding(2, 5))),
    _entry("bridgetower", "BridgeTowerConfig",
           {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 64,
            "text_config": TEXT, "vision_config": {**VISION, "hidden_size": 64}},
            "BridgeTowerModel",
           ids(pixel_values=_PIX, pixel_mask=Ints((2, 32, 32), 1, 2))),
    _entry("git", "GitConfig", {**TEXT, "vision_config": VISION, "use_cache": False}, "GitModel",
           ids(pixel_values=_PIX, use_cache=False)),
    _entry("x_clip", "XCLIPConfig",
           {"text_config": _TXT, "vision_config": {**_IMG, "num_frames": 2, "mit_hidden_size": 32,
                                                   "mit_intermediate_size": 64,
                                                   "mit_num_attention_heads": 4,
                                                   "mit_num_hidden_layers": 1},
            "projection_dim": 32, "prompt_layers": 1, "prompt_num_attention_heads": 4},
            "XCLIPModel",
           ids(pixel_values=Floats((2, 2, 3, 32, 32)))),
    _entry("layoutlmv3", "LayoutLMv3Config",
           {**TEXT, "input_size": 32, "patch_size": 8, "coordinate_size": 4, "shape_size": 8,
            "rel_pos_bins": 8, "max_rel_pos": 16, "rel_2d_pos_bins": 8, "max_rel_2d_pos": 16,
            "has_relative_attention_bias": True,
            "has_spatial_attention_bias": True, "max_2d_position_embeddings": 32},
            "LayoutLMv3Model",
           ids(bbox=Ints((2, 12, 4), 0, 16), pixel_values=_PIX)),
    _entry("udop_encoder", "UdopConfig",
           {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2,
            "num_heads": 4, "image_size": 32, "patch_size": 8, "max_2d_position_embeddings": 32,
            "pad_token_id": 0}, "UdopEncoderModel",
           ids(bbox=Uniform((2, 12, 4)))),
    _entry("trocr_decoder", "TrOCRConfig",
           {"vocab_size": VOCAB, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4,
            "decoder_ffn_dim": 64, "max_position_embeddings": 64, "cross_attention_hidden_size": 32,
            "use_cache": False}, "TrOCRForCausalLM",
           ids(encoder_hidden_states=Floats((2, 9, 32)), use_cache=False)),
    _entry("blip_2_qformer", "Blip2QFormerConfig", {**TEXT, "encoder_hidden_size": 32},
           "Blip2QFormerModel",
           draw(query_embeds=Floats((2, 4, 32)), encoder_hidden_states=Floats((2, 9, 32)),
                encoder_attention_mask=Padding(2, 9))),
    _entry("llava", "LlavaConfig",
           {"vision_config": ("CLIPVisionConfig", VISION), "text_config": ("LlamaConfig", GQA),
            "image_token_id": 4, "vision_feature_layer": -1}, "LlavaModel",
           draw(input_ids=lambda: _image_tokens(16), attention_mask=Padding(2, 24),
                pixel_values=_PIX,
                use_cache=False)),
    _entry("bert_decoder", "BertConfig", {**TEXT, "is_decoder": True, "use_cache": False},
           "BertModel",
           ids(use_cache=False)),
    _entry("grounding_dino", "GroundingDinoConfig",
           {"backbone_config": ("SwinConfig", {**_SWIN_4[1], "out_features": _STAGES[1:]}),
            "text_config": ("BertConfig", {**TEXT}), "d_model": 32, "encoder_layers": 1,
            "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 6, "num_feature_levels": 3,
            "encoder_n_points": 2, "decoder_n_points": 2, "max_text_len": 16}, "GroundingDinoModel",
           ids(pixel_values=Floats((2, 3, 64, 64)))),
    _entry("sam", "SamConfig",
           {"vision_config": {**VISION, "image_size": 64, "window_size": 3, "output_channels": 32,
                              "global_attn_indexes": [1], "mlp_dim": 64, "num_pos_feats": 16},
            "prompt_encoder_config": {"hidden_size": 32, "image_size": 64, "patch_size": 8,
                                      "mask_input_channels": 4},
            "mask_decoder_config": {"hidden_size": 32, "mlp_dim": 64, "num_hidden_layers": 2,
                                    "num_attention_heads": 4, "iou_head_hidden_dim": 32}},
           "SamModel",
           draw(pixel_values=Floats((2, 3, 64, 64)), input_points=Floats((2, 1, 2, 2)))),
]
