"""Models of timm, torchvision and diffusers."""

from __future__ import annotations

import importlib
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.families import LABELS, ROWS, Batch, Family, Step, pictures

_OPS = (
    "nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d",
    "_roi_align_backward", "_roi_pool_backward", "_ps_roi_align_backward",
    "_ps_roi_pool_backward", "_deform_conv2d_backward",
)  # fmt: skip


@cache
def torchvision_importable() -> torch.library.Library | None:
    """Name torchvision's own operators, where its binary does not fit this torch.

    It then imports; none of the models here uses these operators.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        named = torch.library.Library("torchvision", "FRAGMENT")
        for name in _OPS:
            named.define(f"{name}(Tensor a, Tensor b, float c) -> Tensor")
        return named
    return None


class Classifier(nn.Module):
    """A model of images and its loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        found = self.model(images)
        return F.cross_entropy(found, labels)


def _timm(model: str, size: int, options: dict[str, Any]) -> tuple[nn.Module, Batch]:
    library = importlib.import_module("timm")
    made = library.create_model(model, pretrained=False, num_classes=LABELS, **options)
    return Classifier(made), {"images": pictures(size), "labels": torch.arange(ROWS)}


def _mixer() -> tuple[nn.Module, Batch]:
    library = importlib.import_module("timm.models.mlp_mixer")
    made = library.MlpMixer(LABELS, img_size=32, patch_size=8, num_blocks=4, embed_dim=32)
    return Classifier(made), {"images": pictures(32), "labels": torch.arange(ROWS)}


def _torchvision(model: str, options: dict[str, Any]) -> tuple[nn.Module, Batch]:
    library = importlib.import_module("torchvision.models")
    made = getattr(library, model)(num_classes=LABELS, **options)
    return Classifier(made), {"images": pictures(64), "labels": torch.arange(ROWS)}


def _diffusers(
    model: str, options: dict[str, Any], given: tuple[str, ...]
) -> tuple[nn.Module, Batch]:
    made = getattr(importlib.import_module("diffusers"), model)(**options)
    values: Batch = {
        "sample": torch.randn(ROWS, 4, 16, 16),
        "hidden_states": torch.randn(ROWS, 4, 16, 16),
        "timestep": torch.randint(0, 100, (ROWS,)),
        "encoder_hidden_states": torch.randn(ROWS, 8, 16),
        "pooled_projections": torch.randn(ROWS, 16),
        "class_labels": torch.arange(ROWS),
    }
    return Step(made), {name: values[name] for name in given}


def _of_timm(name: str, model: str, size: int = 32, **options: Any) -> Family:
    return Family(name, "vision", "timm", partial(_timm, model, size, options))


def _of_torchvision(name: str, model: str, **options: Any) -> Family:
    return Family(name, "vision", "torchvision", partial(_torchvision, model, options))


def _of_diffusers(name: str, model: str, options: dict[str, Any], *given: str) -> Family:
    build = partial(_diffusers, model, options, given)
    return Family(name, "diffusion", "diffusers", build)


_SMALL = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}

FAMILIES = (
    _of_timm("timm-efficientnet", "test_efficientnet", 64, drop_path_rate=0.2),
    _of_timm("timm-byobnet", "test_byobnet", 64),
    _of_timm("timm-convnext", "test_convnext", 64),
    _of_timm("timm-resnet", "test_resnet", 64),
    _of_timm("timm-vit", "test_vit3", 64, img_size=64, drop_rate=0.1, drop_path_rate=0.1),
    Family("timm-mixer", "vision", "timm", _mixer),
    _of_timm("timm-nfnet", "test_nfnet", 64),
    _of_torchvision("tv-densenet", "DenseNet", growth_rate=4, block_config=(2, 2, 2),
                    num_init_features=8),
    _of_torchvision("tv-squeezenet", "squeezenet1_1"),
    _of_diffusers("unet-2d", "UNet2DModel",
                  {**_SMALL, "in_channels": 4, "out_channels": 4, "sample_size": 16,
                   "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                   "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 8},
                  "sample", "timestep"),
    _of_diffusers("unet-condition", "UNet2DConditionModel",
                  {**_SMALL, "sample_size": 16, "cross_attention_dim": 16,
                   "attention_head_dim": 4,
                   "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                   "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
                  "sample", "timestep", "encoder_hidden_states"),
    _of_diffusers("dit", "DiTTransformer2DModel",
                  {"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4,
                   "num_layers": 4, "sample_size": 16, "norm_num_groups": 4},
                  "hidden_states", "timestep", "class_labels"),
    _of_diffusers("sd3", "SD3Transformer2DModel",
                  {"sample_size": 16, "in_channels": 4, "num_layers": 3, "attention_head_dim": 8,
                   "num_attention_heads": 4, "joint_attention_dim": 16,
                   "caption_projection_dim": 32, "pooled_projection_dim": 16, "out_channels": 4},
                  "hidden_states", "timestep", "encoder_hidden_states", "pooled_projections"),
    _of_diffusers("autoencoder-kl", "AutoencoderKL",
                  {**_SMALL, "in_channels": 4, "out_channels": 4, "latent_channels": 2,
                   "down_block_types": ("DownEncoderBlock2D",) * 2,
                   "up_block_types": ("UpDecoderBlock2D",) * 2}, "sample"),
    _of_diffusers("vq-model", "VQModel",
                  {**_SMALL, "in_channels": 4, "out_channels": 4, "latent_channels": 2,
                   "num_vq_embeddings": 16, "down_block_types": ("DownEncoderBlock2D",) * 2,
                   "up_block_types": ("UpDecoderBlock2D",) * 2}, "sample"),
)  # fmt: skip
