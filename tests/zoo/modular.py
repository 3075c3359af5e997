"""Models whose layers do not stand in one plain row: a U-Net, ``nn.Transformer``, T5, BART."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, T5Config
from transformers import T5ForConditionalGeneration as T5Model

from tests.zoo import Built, Case, children_of, no_blocks, scalar, seeded

SPECIAL: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}


class DoubleConv(nn.Module):
    """Two convolutions with batch normalisation; [B, I, H, W] -> [B, O, H, W]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.steps = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.steps(x)  # type: ignore[no-any-return]


class UNet(nn.Module):
    """A U-Net of two levels; ``ups`` is declared first, as in many an implementation."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.ups = nn.ModuleList([DoubleConv(6 * width, 2 * width), DoubleConv(3 * width, width)])
        self.downs = nn.ModuleList([DoubleConv(3, width), DoubleConv(width, 2 * width)])
        self.bottleneck = DoubleConv(2 * width, 4 * width)
        self.pool = nn.MaxPool2d(2)
        self.upsample = nn.Upsample(scale_factor=2)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return scalar(self.image(x))

    def image(self, x: Tensor) -> Tensor:
        """One channel of the size of the images."""
        skips = []
        for down in self.downs:
            x = down(x)
            skips.append(x)
            x = self.pool(x)
        x = self.bottleneck(x)
        for up in self.ups:
            x = up(torch.cat([self.upsample(x), skips.pop()], dim=1))
        return self.head(x)  # type: ignore[no-any-return]


def unet() -> Built:
    """A U-Net and two images [2, 3, 16, 16]."""
    return UNet(), (torch.randn(2, 3, 16, 16),)


class Translator(nn.Module):
    """``nn.Transformer`` and a loss."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.transformer = nn.Transformer(
            16, 2, num_encoder_layers=2, num_decoder_layers=2, dim_feedforward=32,
            dropout=0.1, batch_first=True, **options,
        )  # fmt: skip

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return scalar(self.transformer(source, target))


def transformer() -> Built:
    """``nn.Transformer`` with two layers each side, dropout everywhere."""
    return Translator(), (torch.randn(3, 7, 16), torch.randn(3, 5, 16))


class Seq2Seq(nn.Module):
    """A Hugging Face encoder-decoder; the loss is the mean square of its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return scalar(self.model(input_ids=ids, decoder_input_ids=ids, use_cache=False).logits)


def t5() -> Built:
    """T5, two blocks each side; its sublayers are repeated modules as well."""
    config = T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.1,
        **SPECIAL,
    )  # fmt: skip
    return Seq2Seq(T5Model(config)), (torch.arange(12).reshape(2, 6),)


def bart() -> Built:
    """BART, two layers each side."""
    config = BartConfig(
        vocab_size=64, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, dropout=0.1,
        max_position_embeddings=16, forced_eos_token_id=None, **SPECIAL,
    )  # fmt: skip
    return Seq2Seq(BartForConditionalGeneration(config)), (torch.arange(12).reshape(2, 6),)


UNET = Case("unet", seeded(unet), no_blocks, mutates_buffers=True)
TRANSFORMER = Case(
    "transformer",
    seeded(transformer),
    children_of("transformer.encoder.layers", "transformer.decoder.layers"),
    draws_random=True,
)
T5 = Case("t5", seeded(t5), no_blocks, draws_random=True)
BART = Case("bart", seeded(bart), no_blocks, draws_random=True)
