"""Audio and speech models: waveforms, log-mel spectrograms, codes, and text to speech."""

from __future__ import annotations

from typing import Any

from tests.models.zoo import VOCAB, Entry, Floats, Ints, Padding, draw, ids

_WAV: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "conv_dim": [16, 16], "conv_kernel": [8, 4], "conv_stride": [4, 4],
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2,
    "apply_spec_augment": False, "feat_extract_norm": "layer",
}
_WHISPER: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8,
    "max_source_positions": 16, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 2, "use_cache": False,
}
_SAMPLES = 400


def _wave(name: str, prefix: str, mask: bool = False, **over: Any) -> Entry:
    values: dict[str, Any] = {"input_values": Floats((2, _SAMPLES))}
    if mask:
        values["attention_mask"] = Padding(2, _SAMPLES)
    return Entry(name, f"{prefix}Config", {**_WAV, **over}, f"{prefix}Model", draw(**values),
                 "audio")


def _entry(name: str, config: str, over: dict[str, Any], model: str, make: Any) -> Entry:
    return Entry(name, config, over, model, make, "audio")


ENTRIES: list[Entry] = [
    _entry("whisper_encoder", "WhisperConfig", _WHISPER,
           "models.whisper.modeling_whisper.WhisperEncoder",
           draw(input_features=Floats((2, 8, 32)))),
    _entry("whisper", "WhisperConfig", _WHISPER, "WhisperModel",
           draw(input_features=Floats((2, 8, 32)), decoder_input_ids=Ints((2, 7), 5, VOCAB),
                decoder_attention_mask=Padding(2, 7), use_cache=False)),
    _wave("wav2vec2", "Wav2Vec2", mask=True),
    _wave("hubert", "Hubert", mask=True),
    _wave("wavlm", "WavLM", num_buckets=8, max_bucket_distance=16),
    _wave("unispeech", "UniSpeech"),
    _wave("unispeech_sat", "UniSpeechSat"),
    _wave("sew", "SEW", squeeze_factor=2),
    _wave("sew_d", "SEWD", squeeze_factor=2, position_buckets=8, max_position_embeddings=64,
          share_att_key=True, relative_attention=True, pos_att_type=["p2c", "c2p"],
          norm_rel_ebd="layer_norm"),
    _wave("data2vec_audio", "Data2VecAudio", num_conv_pos_embeddings=2, conv_pos_kernel_size=3),
    _wave("wav2vec2_conformer", "Wav2Vec2Conformer", position_embeddings_type="relative",
          conv_depthwise_kernel_size=3),
    _wave("wav2vec2_conformer_rotary", "Wav2Vec2Conformer", position_embeddings_type="rotary",
          conv_depthwise_kernel_size=3),
    _entry("wav2vec2_bert", "Wav2Vec2BertConfig",
           {**_WAV, "feature_projection_input_dim": 16, "position_embeddings_type": "relative_key",
            "left_max_position_embeddings": 8, "right_max_position_embeddings": 4,
            "conv_depthwise_kernel_size": 3}, "Wav2Vec2BertModel",
           draw(input_features=Floats((2, 20, 16)), attention_mask=Padding(2, 20))),
    _entry("audio_spectrogram_transformer", "ASTConfig",
           {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 64,
            "patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": 24,
            "num_mel_bins": 16},
           "ASTModel", draw(input_values=Floats((2, 24, 16)))),
    _entry("speech_to_text", "Speech2TextConfig",
           {**{k: v for k, v in _WHISPER.items() if k != "num_mel_bins"},
            "input_feat_per_channel": 8,
            "input_channels": 1, "conv_channels": 16, "max_source_positions": 64},
            "Speech2TextModel",
           draw(input_features=Floats((2, 32, 8)), decoder_input_ids=Ints((2, 7), 5, VOCAB),
                use_cache=False)),
    _entry("speecht5", "SpeechT5Config",
           {**{k: v for k, v in _WAV.items() if k not in ("num_hidden_layers",
                                                          "intermediate_size")},
            "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
            "num_mel_bins": 8, "speech_decoder_prenet_units": 16, "speaker_embedding_dim": 8,
            "encoder_max_relative_position": 8, "use_cache": False}, "SpeechT5ForTextToSpeech",
           ids(decoder_input_values=Floats((2, 6, 8)), speaker_embeddings=Floats((2, 8)),
               use_cache=False)),
    _entry("clap_audio", "ClapAudioConfig",
           {"window_size": 4, "spec_size": 64, "patch_size": 4, "patch_stride": [4, 4],
            "hidden_size": 32,
            "patch_embeds_hidden_size": 16, "depths": [2, 2], "num_attention_heads": [2, 4],
            "num_mel_bins": 16, "projection_dim": 16, "num_hidden_layers": 2}, "ClapAudioModel",
           draw(input_features=Floats((2, 1, 256, 16)))),
    _entry("mimi", "MimiConfig",
           {"hidden_size": 32, "num_filters": 4, "num_residual_layers": 1,
            "upsampling_ratios": [4, 2],
            "codebook_size": 16, "codebook_dim": 16, "vector_quantization_hidden_dimension": 16,
            "num_quantizers": 4, "num_semantic_quantizers": 1, "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 64, "sliding_window": 8,
            "upsample_groups": 32, "use_cache": False}, "MimiModel",
            draw(input_values=Floats((2, 1, 384)))),
    _entry("moonshine", "MoonshineConfig",
           {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64,
            "encoder_num_hidden_layers": 2,
            "decoder_num_hidden_layers": 2, "encoder_num_attention_heads": 4,
            "decoder_num_attention_heads": 4,
            "encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4,
            "max_position_embeddings": 64, "use_cache": False}, "MoonshineModel",
           draw(input_values=Floats((2, 4000)), decoder_input_ids=Ints((2, 7), 5, VOCAB),
                use_cache=False)),
    _entry("musicgen_decoder", "MusicgenDecoderConfig",
           {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 64, "num_codebooks": 2, "max_position_embeddings": 64, "use_cache": False},
           "MusicgenForCausalLM", draw(input_ids=Ints((4, 12), 5, VOCAB), use_cache=False)),
    _entry("seamless_m4t_encoder", "SeamlessM4TConfig",
           {"vocab_size": VOCAB, "hidden_size": 32, "feature_projection_input_dim": 16,
            "speech_encoder_layers": 2, "speech_encoder_attention_heads": 4,
            "speech_encoder_intermediate_size": 64, "max_source_positions": 64,
            "position_embeddings_type": "relative", "conv_depthwise_kernel_size": 3},
           "models.seamless_m4t.modeling_seamless_m4t.SeamlessM4TSpeechEncoder",
           draw(input_features=Floats((2, 20, 16)), attention_mask=Padding(2, 20))),
    _entry("parakeet_encoder", "ParakeetEncoderConfig",
           {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 64,
            "num_mel_bins": 16, "subsampling_conv_channels": 8, "conv_kernel_size": 3,
            "max_position_embeddings": 64}, "ParakeetEncoder",
           draw(input_features=Floats((2, 64, 16)), attention_mask=Padding(2, 64))),
    _entry("fastspeech2_conformer", "FastSpeech2ConformerConfig",
           {"hidden_size": 32, "vocab_size": VOCAB, "num_mel_bins": 8,
            "encoder_num_attention_heads": 2,
            "encoder_layers": 1, "encoder_linear_units": 48, "decoder_layers": 1,
            "decoder_num_attention_heads": 2, "decoder_linear_units": 48,
            "speech_decoder_postnet_units": 16,
            "speech_decoder_postnet_layers": 1, "positionwise_conv_kernel_size": 3,
            "encoder_kernel_size": 3, "decoder_kernel_size": 3, "duration_predictor_channels": 16,
            "energy_predictor_channels": 16, "pitch_predictor_channels": 16},
           "models.fastspeech2_conformer.modeling_fastspeech2_conformer.FastSpeech2ConformerModel",
           draw(input_ids=Ints((2, 8), 5, VOCAB))),
]
