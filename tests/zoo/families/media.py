"""Hugging Face models of images, sound, time series, and of several at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tests.zoo.families import HEADS, LABELS, ROWS, WIDTH, Batch, Family, pictures, tokens
from tests.zoo.families.text import BOTH, USUAL, of_transformers

SIZE = 32


def labelled(size: int = SIZE) -> Batch:
    """Images with a label each."""
    return {"pixel_values": pictures(size), "labels": torch.arange(ROWS)}


def _pictures_alone() -> Batch:
    return {"pixel_values": pictures(SIZE)}


def _segmented() -> Batch:
    return {"pixel_values": pictures(64), "labels": torch.randint(0, LABELS, (ROWS, 64, 64))}


def _captioned() -> Batch:
    return {"input_ids": tokens(16), "pixel_values": pictures(SIZE), "return_loss": True}


def _spoken() -> Batch:
    return {"input_values": torch.randn(ROWS, 1600), "labels": torch.randint(1, 30, (ROWS, 4))}


def _transcribed() -> Batch:
    return {"input_features": torch.randn(ROWS, 16, 64), "labels": tokens(12)}


def _read_aloud() -> Batch:
    return {"input_features": torch.randn(ROWS, 64, 16), "labels": tokens(12)}


def _spectra() -> Batch:
    return {"input_values": torch.randn(ROWS, 32, 16), "labels": torch.arange(ROWS)}


def _series() -> Batch:
    past, features = 20, 2
    return {
        "past_values": torch.randn(ROWS, past).abs(),
        "past_time_features": torch.randn(ROWS, past, features),
        "past_observed_mask": torch.ones(ROWS, past),
        "future_values": torch.randn(ROWS, 8).abs(),
        "future_time_features": torch.randn(ROWS, 8, features),
    }


def _patches() -> Batch:
    return {"past_values": torch.randn(ROWS, 32, 3), "future_values": torch.randn(ROWS, 8, 3)}


def _trajectories() -> Batch:
    return {
        "states": torch.randn(ROWS, 8, 5), "actions": torch.randn(ROWS, 8, 3),
        "rewards": torch.randn(ROWS, 8, 1), "returns_to_go": torch.randn(ROWS, 8, 1),
        "timesteps": torch.arange(8).repeat(ROWS, 1), "attention_mask": torch.ones(ROWS, 8),
    }  # fmt: skip


def _hf(
    name: str,
    model: str,
    config: str,
    options: dict[str, Any],
    batch: Callable[[], Batch] = labelled,
    kind: str = "vision",
    odd: str = "",
) -> Family:
    build = partial(of_transformers, model, config, batch, options)
    return Family(name, kind, "transformers", build, odd)


_VIT = {"hidden_size": WIDTH, "num_hidden_layers": 4, "num_attention_heads": HEADS,
        "intermediate_size": 2 * WIDTH, "image_size": SIZE, "patch_size": 8,
        "num_labels": LABELS}  # fmt: skip
_SOUND = {"vocab_size": 32, "hidden_size": WIDTH, "num_hidden_layers": 3,
          "num_attention_heads": HEADS, "intermediate_size": 2 * WIDTH, "conv_dim": [16, 16],
          "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_conv_pos_embeddings": 8,
          "num_conv_pos_embedding_groups": 4, "mask_time_length": 2,
          "num_feat_extract_layers": 2, "layerdrop": 0.2, "pad_token_id": 0}  # fmt: skip
_TEXT_PART = {**USUAL, "projection_dim": 16}
_SERIES = {"prediction_length": 8, "context_length": 16, "lags_sequence": [1, 2, 4],
           "num_time_features": 2, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2,
           "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}  # fmt: skip

FAMILIES = (
    _hf("vit", "ViTForImageClassification", "ViTConfig", _VIT),
    _hf("beit", "BeitForImageClassification", "BeitConfig",
        {**_VIT, "use_relative_position_bias": True, "drop_path_rate": 0.2}),
    _hf("dinov2", "Dinov2ForImageClassification", "Dinov2Config",
        {**_VIT, "drop_path_rate": 0.2}),
    _hf("vit-mae", "ViTMAEForPreTraining", "ViTMAEConfig",
        {**_VIT, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 2,
         "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32}, _pictures_alone),
    _hf("swin", "SwinForImageClassification", "SwinConfig",
        {"image_size": SIZE, "patch_size": 2, "embed_dim": 16, "depths": [2, 2],
         "num_heads": [2, 4], "window_size": 4, "num_labels": LABELS}),
    _hf("convnext", "ConvNextForImageClassification", "ConvNextConfig",
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "drop_path_rate": 0.1,
         "num_labels": LABELS}),
    _hf("resnet", "ResNetForImageClassification", "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic",
         "num_labels": LABELS}),
    _hf("regnet", "RegNetForImageClassification", "RegNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 2, 1],
         "groups_width": 8, "num_labels": LABELS}),
    _hf("mobilenet-v2", "MobileNetV2ForImageClassification", "MobileNetV2Config",
        {"image_size": SIZE, "depth_multiplier": 0.25, "num_labels": LABELS}),
    _hf("segformer", "SegformerForSemanticSegmentation", "SegformerConfig",
        {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1],
         "num_attention_heads": [1, 2, 2, 4], "decoder_hidden_size": 16, "num_labels": LABELS},
        _segmented),
    _hf("poolformer", "PoolFormerForImageClassification", "PoolFormerConfig",
        {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 2, 1], "num_labels": LABELS}),
    _hf("clip", "CLIPModel", "CLIPConfig",
        {"text_config": _TEXT_PART, "vision_config": _VIT, "projection_dim": 16}, _captioned),
    _hf("siglip", "SiglipModel", "SiglipConfig",
        {"text_config": USUAL, "vision_config": _VIT}, _captioned),
    _hf("wav2vec2", "Wav2Vec2ForCTC", "Wav2Vec2Config", _SOUND, _spoken, "speech"),
    _hf("hubert", "HubertForCTC", "HubertConfig", _SOUND, _spoken, "speech"),
    _hf("whisper", "WhisperForConditionalGeneration", "WhisperConfig",
        {**BOTH, "num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 32},
        _transcribed, "speech"),
    _hf("speech-to-text", "Speech2TextForConditionalGeneration", "Speech2TextConfig",
        {**BOTH, "input_feat_per_channel": 16, "max_source_positions": 64,
         "max_target_positions": 32, "conv_channels": 32}, _read_aloud, "speech"),
    _hf("ast", "ASTForAudioClassification", "ASTConfig",
        {**_VIT, "max_length": 32, "num_mel_bins": 16, "patch_size": 8, "time_stride": 8,
         "frequency_stride": 8}, _spectra, "speech"),
    _hf("time-series", "TimeSeriesTransformerForPrediction", "TimeSeriesTransformerConfig",
        _SERIES, _series, "series"),
    _hf("patch-tst", "PatchTSTForPrediction", "PatchTSTConfig",
        {"num_input_channels": 3, "context_length": 32, "prediction_length": 8, "d_model": 16,
         "patch_length": 4, "patch_stride": 4, "num_attention_heads": 2, "ffn_dim": 32}, _patches,
        "series"),
    _hf("decision", "DecisionTransformerModel", "DecisionTransformerConfig",
        {"state_dim": 5, "act_dim": 3, "hidden_size": WIDTH, "max_ep_len": 16, "n_layer": 3,
         "n_head": 2}, _trajectories, "series"),
)  # fmt: skip
