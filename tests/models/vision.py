"""Vision models: classification, dense prediction, detection, video, and time series."""

from __future__ import annotations

from typing import Any

from tests.models.zoo import VISION, Entry, Floats, Ints, draw, pixels

_SWIN: dict[str, Any] = {
    "image_size": 32, "patch_size": 2, "num_channels": 3, "embed_dim": 16, "depths": [2, 2],
    "num_heads": [2, 4], "window_size": 4, "mlp_ratio": 2.0,
}
_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_SWIN_4 = ("SwinConfig", {**_SWIN, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4],
                          "out_features": _STAGES})
_CNN: dict[str, Any] = {
    "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
_RESNET = ("ResNetConfig", {**_CNN, "out_features": _STAGES[1:]})
_LAST = ("ResNetConfig", {**_CNN, "out_features": ["stage4"]})
_RT_RESNET = ("RTDetrResNetConfig", {**_CNN, "out_features": _STAGES[1:]})
_DETR: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 6,
}
_RT: dict[str, Any] = {
    "d_model": 32, "encoder_hidden_dim": 32, "encoder_in_channels": [16, 24, 32],
    "encoder_ffn_dim": 64,
    "encoder_attention_heads": 4, "decoder_in_channels": [32, 32, 32], "decoder_ffn_dim": 64,
    "decoder_attention_heads": 4, "decoder_layers": 2, "num_queries": 10, "num_denoising": 0,
    "num_labels": 5, "anchor_image_size": None,
}
_SEG: dict[str, Any] = {
    "num_encoder_blocks": 4, "depths": [1, 1, 1, 1], "sr_ratios": [8, 4, 2, 1],
    "hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 2, 4],
}


def _vit_like(name: str, prefix: str, size: int = 32, **over: Any) -> Entry:
    return Entry(name, f"{prefix}Config", {**VISION, **over}, f"{prefix}Model", pixels(size),
                 "vision")


def _entry(name: str, config: str, over: dict[str, Any], model: str, make: Any = None) -> Entry:
    return Entry(name, config, over, model, make or pixels(), "vision")


IMAGES = [
    _vit_like("vit", "ViT"),
    _vit_like("deit", "DeiT"),
    _vit_like("beit", "Beit", use_relative_position_bias=True),
    _vit_like("beit_shared", "Beit", use_shared_relative_position_bias=True),
    _vit_like("data2vec_vision", "Data2VecVision", use_relative_position_bias=True),
    _vit_like("dinov2", "Dinov2", mlp_ratio=2),
    _vit_like("dinov2_registers", "Dinov2WithRegisters", mlp_ratio=2),
    _vit_like("dinov3_vit", "DINOv3ViT"),
    _vit_like("vit_msn", "ViTMSN"),
    _vit_like("ijepa", "IJepa"),
    _vit_like("yolos", "Yolos", image_size=[32, 32], num_detection_tokens=4),
    _entry("vit_mae", "ViTMAEConfig", {**VISION, "decoder_num_attention_heads": 4,
                                       "decoder_hidden_size": 32, "decoder_num_hidden_layers": 2,
                                       "decoder_intermediate_size": 64},
           "ViTMAEModel", pixels(noise=Floats((2, 16)))),
    _entry("vitdet", "VitDetConfig", {**VISION, "window_size": 2, "window_block_indices": [0],
                                      "use_relative_position_embeddings": True,
                                      "pretrain_image_size": 32},
           "VitDetModel"),
    _entry("swin", "SwinConfig", _SWIN, "SwinModel"),
    _entry("swinv2", "Swinv2Config", _SWIN, "Swinv2Model"),
    _entry("swin2sr", "Swin2SRConfig", {**_SWIN, "patch_size": 1, "upscale": 2}, "Swin2SRModel"),
    _entry("donut_swin", "DonutSwinConfig", _SWIN, "DonutSwinModel"),
    _entry("clip_vision", "CLIPVisionConfig", VISION, "CLIPVisionModel"),
    _entry("siglip_vision", "SiglipVisionConfig", VISION, "SiglipVisionModel"),
    _entry("segformer", "SegformerConfig", _SEG, "SegformerModel", pixels(64)),
    _entry("glpn", "GLPNConfig", {**_SEG, "decoder_hidden_size": 32}, "GLPNModel", pixels(64)),
    _entry("pvt", "PvtConfig", {"image_size": 64, "depths": [1, 1, 1, 1],
                                "hidden_sizes": [8, 16, 24, 32],
                                "sequence_reduction_ratios": [8, 4, 2, 1],
                                "num_attention_heads": [1, 2, 2, 4]},
           "PvtModel", pixels(64)),
    _entry("pvt_v2", "PvtV2Config", {"image_size": 64, "depths": [1, 1, 1, 1],
                                     "hidden_sizes": [8, 16, 24, 32],
                                     "num_attention_heads": [1, 2, 2, 4]}, "PvtV2Model",
                                     pixels(64)),
    _entry("cvt", "CvtConfig", {"embed_dim": [16, 24, 32], "num_heads": [1, 2, 4],
                                "depth": [1, 2, 3]},
           "CvtModel"),
    _entry("levit", "LevitConfig", {"image_size": 64, "hidden_sizes": [16, 24, 32],
                                    "num_attention_heads": [2, 3, 4],
                                    "depths": [1, 1, 1], "key_dim": [8, 8, 8]}, "LevitModel",
                                    pixels(64)),
    _entry("mobilevit", "MobileViTConfig", {"image_size": 64, "hidden_sizes": [16, 24, 32],
                                            "neck_hidden_sizes": [8, 8, 16, 24, 32, 48, 64],
                                            "num_attention_heads": 4}, "MobileViTModel",
                                            pixels(64)),
    _entry("mobilevitv2", "MobileViTV2Config", {"image_size": 64, "width_multiplier": 0.25},
           "MobileViTV2Model",
           pixels(64)),
    _entry("swiftformer", "SwiftFormerConfig", {"embed_dims": [8, 16, 24, 32],
                                                "depths": [1, 1, 1, 1]},
           "SwiftFormerModel", pixels(64)),
    _entry("hiera", "HieraConfig", {"embed_dim": 16, "image_size": [32, 32], "patch_size": [3, 3],
                                    "patch_stride": [2, 2], "patch_padding": [1, 1],
                                    "query_stride": [2, 2], "masked_unit_size": [4, 4],
                                    "depths": [1, 1, 2],
                                    "num_heads": [1, 2, 4], "num_query_pool": 2}, "HieraModel"),
    _entry("dpt", "DPTConfig", {**VISION, "num_hidden_layers": 4, "is_hybrid": False,
                                "backbone_out_indices": [0, 1, 2, 3],
                                "neck_hidden_sizes": [8, 16, 24, 32], "fusion_hidden_size": 16},
           "DPTForDepthEstimation"),
    _entry("sam_vision", "SamVisionConfig", {**VISION, "image_size": 64, "window_size": 3,
                                             "output_channels": 16,
                                             "global_attn_indexes": [1], "mlp_dim": 64,
                                             "use_rel_pos": True},
           "SamVisionModel", pixels(64)),
    _entry("upernet", "UperNetConfig",
           {"backbone_config": ("SwinConfig", {**_SWIN, "out_features": ["stage1", "stage2"]}),
            "hidden_size": 16, "pool_scales": [1, 2], "use_auxiliary_head": False, "num_labels": 4},
           "UperNetForSemanticSegmentation"),
    _entry("vitpose", "VitPoseConfig",
           {"backbone_config": ("VitPoseBackboneConfig", {**VISION, "image_size": [32, 32],
                                                          "patch_size": [8, 8],
                                                          "out_indices": [2]}),
            "num_labels": 3, "use_simple_decoder": True}, "VitPoseForPoseEstimation"),
    _entry("imagegpt", "ImageGPTConfig", {"vocab_size": 99, "n_positions": 64, "n_embd": 32,
                                          "n_layer": 2,
                                          "n_head": 4, "use_cache": False}, "ImageGPTModel",
           draw(input_ids=Ints((2, 12), 0, 98))),
]

DETECTION = [
    _entry("detr", "DetrConfig", {**_DETR, "backbone_config": _LAST, "use_timm_backbone": False},
           "DetrForObjectDetection", pixels(64)),
    _entry("conditional_detr", "ConditionalDetrConfig",
           {**_DETR, "backbone_config": _LAST, "use_timm_backbone": False},
           "ConditionalDetrForObjectDetection",
           pixels(64)),
    _entry("dab_detr", "DabDetrConfig",
           {**_DETR, "hidden_size": 32, "backbone_config": _LAST, "use_timm_backbone": False},
           "DabDetrForObjectDetection", pixels(64)),
    _entry("table_transformer", "TableTransformerConfig",
           {**_DETR, "backbone_config": _LAST, "use_timm_backbone": False},
           "TableTransformerForObjectDetection",
           pixels(64)),
    _entry("deformable_detr", "DeformableDetrConfig",
           {**_DETR, "backbone_config": _RESNET, "use_timm_backbone": False, "encoder_n_points": 2,
            "decoder_n_points": 2, "num_feature_levels": 3}, "DeformableDetrForObjectDetection",
            pixels(64)),
    _entry("deformable_detr_two_stage", "DeformableDetrConfig",
           {**_DETR, "backbone_config": _RESNET, "use_timm_backbone": False, "encoder_n_points": 2,
            "decoder_n_points": 2, "num_feature_levels": 3, "two_stage": True,
            "with_box_refine": True,
            "two_stage_num_proposals": 6}, "DeformableDetrForObjectDetection", pixels(64)),
    _entry("rt_detr", "RTDetrConfig", {**_RT, "backbone_config": _RT_RESNET},
           "RTDetrForObjectDetection",
           pixels(64)),
    _entry("rt_detr_v2", "RTDetrV2Config", {**_RT, "backbone_config": _RT_RESNET},
           "RTDetrV2ForObjectDetection",
           pixels(64)),
    _entry("d_fine", "DFineConfig",
           {**_RT, "backbone_config": ("HGNetV2Config", {
               "stem_channels": [3, 8, 8], "stage_in_channels": [8, 8, 16, 24],
               "stage_mid_channels": [8, 8, 8, 8], "stage_out_channels": [8, 16, 24, 32],
               "stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [1, 1, 1, 1],
               "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1],
               "out_features": _STAGES[1:]}),
            "layer_scale": 1, "feat_strides": [8, 16, 32], "num_feature_levels": 3},
            "DFineForObjectDetection",
           pixels(64)),
    _entry("mask2former", "Mask2FormerConfig",
           {"backbone_config": _SWIN_4,
            "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32,
            "encoder_feedforward_dim": 64,
            "encoder_layers": 2, "decoder_layers": 3, "num_attention_heads": 4,
            "dim_feedforward": 64, "num_queries": 6}, "Mask2FormerModel", pixels(64)),
    _entry("maskformer", "MaskFormerConfig",
           {"backbone_config": _SWIN_4,
            "decoder_config": ("DetrConfig", {**_DETR, "backbone_config": _LAST,
                                              "use_timm_backbone": False}),
            "fpn_feature_size": 32, "mask_feature_size": 32}, "MaskFormerModel", pixels(64)),
]

VIDEO = [
    _entry("timesformer", "TimesformerConfig", {**VISION, "num_frames": 3}, "TimesformerModel",
           draw(pixel_values=Floats((2, 3, 3, 32, 32)))),
    _entry("videomae", "VideoMAEConfig", {**VISION, "num_frames": 4, "tubelet_size": 2},
           "VideoMAEModel",
           draw(pixel_values=Floats((2, 4, 3, 32, 32)))),
    _entry("vivit", "VivitConfig", {**VISION, "num_frames": 4, "tubelet_size": [2, 8, 8]},
           "VivitModel",
           draw(pixel_values=Floats((2, 4, 3, 32, 32)))),
    _entry("vjepa2", "VJEPA2Config", {**VISION, "crop_size": 32, "frames_per_clip": 4,
                                      "tubelet_size": 2,
                                      "pred_hidden_size": 32, "pred_num_attention_heads": 4,
                                      "pred_num_hidden_layers": 2}, "VJEPA2Model",
           draw(pixel_values_videos=Floats((1, 4, 3, 32, 32)))),
]

SERIES = [
    _entry("patchtst", "PatchTSTConfig", {"num_input_channels": 2, "context_length": 24,
                                          "patch_length": 4, "patch_stride": 4, "d_model": 32,
                                          "num_attention_heads": 4,
                                          "num_hidden_layers": 2, "ffn_dim": 64}, "PatchTSTModel",
           draw(past_values=Floats((2, 24, 2)))),
    _entry("time_series_transformer", "TimeSeriesTransformerConfig",
           {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2],
            "num_time_features": 2,
            "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
            "scaling": "mean", "use_cache": False}, "TimeSeriesTransformerModel",
           draw(past_values=Floats((2, 10)), past_time_features=Floats((2, 10, 2)),
                past_observed_mask=Ints((2, 10), 1, 2), future_values=Floats((2, 4)),
                future_time_features=Floats((2, 4, 2)), use_cache=False)),
]

ENTRIES: list[Entry] = [*IMAGES, *DETECTION, *VIDEO, *SERIES]
