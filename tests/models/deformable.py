"""Small random models of transformers with deformable attention, with inputs for a call of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

Case = tuple[nn.Module, dict[str, Any]]
LABELS, QUERIES, WIDTH = 5, 9, 32
_LATE = ["stage2", "stage3", "stage4"]
_ALL = ["stage1", *_LATE]


def image(batch: int, side: int) -> Tensor:
    return torch.randn(batch, 3, side, side)


def _pixels(batch: int, side: int) -> dict[str, Tensor]:
    return {"pixel_values": image(batch, side),
            "pixel_mask": torch.ones(batch, side, side, dtype=torch.long)}


# -- backbones -------------------------------------------------------------------------------------
def _resnet() -> Any:
    return hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 16, 24], depths=[1] * 4,
                           layer_type="basic", out_features=_LATE)


def _rt_resnet() -> Any:
    return hf.RTDetrResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 16, 24], depths=[1] * 4,
                                 layer_type="basic", out_features=_LATE)


def _hgnet(out: list[str]) -> Any:
    return hf.HGNetV2Config(
        stem_channels=[3, 8, 8], stage_in_channels=[8, 16, 16, 24], stage_mid_channels=[8] * 4,
        stage_out_channels=[16, 16, 24, 24], stage_num_blocks=[1] * 4,
        stage_numb_of_layers=[1] * 4, embedding_size=8, hidden_sizes=[16, 16, 24, 24],
        out_features=out)


def _swin(out: list[str]) -> Any:
    return hf.SwinConfig(image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2],
                         window_size=2, out_features=out)


# -- models ----------------------------------------------------------------------------------------
def deformable_detr() -> Case:
    config = hf.DeformableDetrConfig(
        backbone_config=_resnet(), use_timm_backbone=False, use_pretrained_backbone=False,
        backbone=None, num_queries=QUERIES, d_model=WIDTH, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=WIDTH,
        decoder_ffn_dim=WIDTH, num_feature_levels=3, encoder_n_points=2, decoder_n_points=2,
        num_labels=LABELS)
    return hf.DeformableDetrForObjectDetection(config), _pixels(2, 64)


def _rt(backbone: Any, channels: list[int], **more: Any) -> dict[str, Any]:
    return dict(
        backbone_config=backbone, use_pretrained_backbone=False, encoder_hidden_dim=WIDTH,
        encoder_in_channels=channels, feat_strides=[8, 16, 32], encoder_layers=1,
        encoder_ffn_dim=WIDTH, encoder_attention_heads=2, d_model=WIDTH, num_queries=QUERIES,
        decoder_in_channels=[WIDTH] * 3, decoder_ffn_dim=WIDTH, num_feature_levels=3,
        decoder_layers=2, decoder_attention_heads=4, num_denoising=0, anchor_image_size=None,
        **{"decoder_n_points": 2, "num_labels": LABELS, **more})


def rt_detr() -> Case:
    config = hf.RTDetrConfig(**_rt(_rt_resnet(), [16, 16, 24]))
    return hf.RTDetrForObjectDetection(config), {"pixel_values": image(2, 64)}


def rt_detr_v2(method: str = "default") -> Case:
    config = hf.RTDetrV2Config(**_rt(_rt_resnet(), [16, 16, 24], decoder_method=method))
    return hf.RTDetrV2ForObjectDetection(config), {"pixel_values": image(2, 64)}


def rt_detr_v2_discrete() -> Case:
    return rt_detr_v2("discrete")


def d_fine() -> Case:
    config = hf.DFineConfig(**_rt(_hgnet(_LATE), [16, 24, 24], decoder_n_points=[1, 3, 2]))
    return hf.DFineForObjectDetection(config), {"pixel_values": image(2, 64)}


def _grounding(kind: str) -> Case:
    text = dict(model_type="bert", hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=WIDTH, vocab_size=2000, max_position_embeddings=64)
    config = getattr(hf, f"{kind}Config")(
        backbone_config=_swin(_LATE), use_pretrained_backbone=False, text_config=text,
        num_queries=QUERIES, d_model=WIDTH, encoder_layers=1, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=WIDTH,
        decoder_ffn_dim=WIDTH, num_feature_levels=4, encoder_n_points=2, decoder_n_points=2,
        max_text_len=16)
    words = torch.tensor([[101, 7, 8, 1012, 9, 102]])
    return getattr(hf, f"{kind}ForObjectDetection")(config), {
        **_pixels(1, 128), "input_ids": words, "attention_mask": torch.ones_like(words),
        "token_type_ids": torch.zeros_like(words)}


def grounding_dino() -> Case:
    return _grounding("GroundingDino")


def mm_grounding_dino() -> Case:
    return _grounding("MMGroundingDino")


def _detr_of_a_vit(**more: Any) -> dict[str, Any]:
    return dict(d_model=WIDTH, num_queries=QUERIES, group_detr=2, decoder_ffn_dim=WIDTH,
                decoder_layers=2, decoder_self_attention_heads=4, decoder_cross_attention_heads=4,
                decoder_n_points=2, hidden_expansion=0.5, num_labels=LABELS, **more)


def lw_detr() -> Case:
    backbone = dict(model_type="lw_detr_vit", hidden_size=WIDTH, num_hidden_layers=2,
                    num_attention_heads=2, image_size=64, pretrain_image_size=64, patch_size=16,
                    window_block_indices=[0], out_indices=[1, 2], num_windows=4)
    config = hf.LwDetrConfig(**_detr_of_a_vit(backbone_config=backbone,
                                              projector_scale_factors=[1.0]))
    return hf.LwDetrForObjectDetection(config), _pixels(2, 64)


def rf_detr() -> Case:
    backbone = dict(model_type="rf_detr_dinov2", hidden_size=WIDTH, num_hidden_layers=2,
                    num_attention_heads=2, image_size=56, patch_size=14, num_windows=2,
                    window_block_indexes=[0], out_indices=[1, 2])
    config = hf.RfDetrConfig(**_detr_of_a_vit(backbone_config=backbone))
    return hf.RfDetrForObjectDetection(config), _pixels(2, 56)


def omdet_turbo() -> Case:
    text = dict(model_type="clip_text_model", hidden_size=48, intermediate_size=48,
                num_hidden_layers=1, num_attention_heads=2, vocab_size=1000,
                max_position_embeddings=16, projection_dim=48, bos_token_id=1, eos_token_id=2)
    config = hf.OmDetTurboConfig(
        backbone_config=_swin(_LATE), use_timm_backbone=False, use_pretrained_backbone=False,
        apply_layernorm_after_vision_backbone=False, text_config=text, text_projection_in_dim=48,
        text_projection_out_dim=48, task_encoder_hidden_dim=WIDTH, class_embed_dim=48,
        encoder_hidden_dim=WIDTH, decoder_hidden_dim=WIDTH, vision_features_channels=[WIDTH] * 3,
        encoder_in_channels=[16, 32, 64], num_feature_levels=3, decoder_num_heads=4,
        decoder_num_layers=2, decoder_num_points=2, decoder_dim_feedforward=WIDTH,
        encoder_dim_feedforward=WIDTH, encoder_attention_heads=4, num_queries=QUERIES)
    words = torch.tensor([[1, 5, 6, 2], [1, 7, 8, 2]])
    task = words[:1]
    return hf.OmDetTurboForObjectDetection(config), {
        "pixel_values": image(1, 64), "classes_input_ids": words,
        "classes_attention_mask": torch.ones_like(words), "tasks_input_ids": task,
        "tasks_attention_mask": torch.ones_like(task), "classes_structure": torch.tensor([2])}


def mask2former() -> Case:
    config = hf.Mask2FormerConfig(
        backbone_config=_swin(_ALL), use_pretrained_backbone=False, feature_size=WIDTH,
        mask_feature_size=WIDTH, hidden_dim=WIDTH, encoder_feedforward_dim=WIDTH, encoder_layers=2,
        decoder_layers=3, num_attention_heads=4, dim_feedforward=WIDTH, num_queries=QUERIES,
        num_labels=LABELS)
    return hf.Mask2FormerForUniversalSegmentation(config), _pixels(1, 64)


def oneformer() -> Case:
    config = hf.OneFormerConfig(
        backbone_config=_swin(_ALL), use_pretrained_backbone=False, conv_dim=WIDTH, mask_dim=WIDTH,
        hidden_dim=WIDTH, encoder_feedforward_dim=WIDTH, encoder_layers=2, decoder_layers=3,
        num_attention_heads=4, dim_feedforward=WIDTH, num_queries=QUERIES, num_labels=LABELS,
        text_encoder_width=WIDTH, text_encoder_context_length=8, text_encoder_num_layers=1,
        text_encoder_vocab_size=100, text_encoder_proj_layers=1, task_seq_len=8,
        text_encoder_n_ctx=2, query_dec_layers=1, is_training=False)
    return hf.OneFormerForUniversalSegmentation(config), {
        **_pixels(1, 64), "task_inputs": torch.randint(0, 50, (1, 8)).float()}


def _layout(kind: str, out: list[str], **more: Any) -> Case:
    config = getattr(hf, f"{kind}Config")(**_rt(
        _hgnet(out), [16, 24, 24], feature_strides=[8, 16, 32], num_labels=25, **more))
    return getattr(hf, f"{kind}ForObjectDetection")(config), {"pixel_values": image(1, 128)}


def pp_doclayout_v2() -> Case:
    return _layout("PPDocLayoutV2", _LATE, class_thresholds=[0.5] * 25,
                   class_order=list(range(25)))


def pp_doclayout_v3() -> Case:
    return _layout("PPDocLayoutV3", _ALL, x4_feat_dim=16)


def pp_doclayout_v4() -> Case:
    return _layout("PPDocLayoutV4", _LATE)


#: with the number of sampling sites of each
MODELS: dict[Callable[[], Case], int] = {
    deformable_detr: 4, rt_detr: 2, rt_detr_v2: 2, rt_detr_v2_discrete: 2, d_fine: 2,
    grounding_dino: 3, mm_grounding_dino: 3, lw_detr: 2, rf_detr: 2, omdet_turbo: 2,
    mask2former: 2, oneformer: 2, pp_doclayout_v2: 2, pp_doclayout_v3: 2, pp_doclayout_v4: 2,
}
