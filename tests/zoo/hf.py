"""Hugging Face models with small configurations and random weights, nothing downloaded.

Every module is a ``TrainStep``: forward returns the loss alone, computed outside of the
model from its logits. Handing the model ``labels`` instead would log a warning in GPT-2's
forward, and a log warning breaks the graph.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from tests.zoo import Built, Case, children_of, seeded
from tests.zoo import checkpoint_blocks as checkpoint_blocks

VOCAB = 128  # the characters are ASCII
MASK_TOKEN = 0  # NUL, which no source text holds
SPECIAL_TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
LABELS = 10
DROPOUT = 0.1


class TrainStep(nn.Module):
    """A model and its loss as one module: ``forward(inputs[, targets])`` returns the loss."""

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, *inputs: Tensor) -> Tensor:
        """Scalar loss; ``inputs[0]`` goes to the model, all of them to the loss."""
        logits: Tensor = self.model(inputs[0]).logits
        return self.loss(logits, *inputs)


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy of ``logits`` [B, T, V] against the next of ``ids`` [B, T]."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def masked_token_loss(logits: Tensor, ids: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of ``logits`` [B, T, V] against ``targets`` [B, T] (-100: not counted)."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def label_loss(logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of ``logits`` [B, L] against ``labels`` [B]."""
    return F.cross_entropy(logits, labels)


def text_ids(batch: int, length: int) -> Tensor:
    """Token ids [batch, length], int64: characters of a module of the standard library."""
    source = inspect.getsource(argparse).encode("ascii", "ignore")
    return torch.tensor(list(source[: batch * length])).reshape(batch, length)


def images(batch: int, size: int) -> Tensor:
    """Plane waves [batch, 3, size, size] in [-1, 1], another direction for each image."""
    ramp = torch.arange(size, dtype=torch.float32)
    wave = torch.arange(1, 3 * batch + 1, dtype=torch.float32).reshape(batch, 3, 1, 1)
    return torch.sin(0.1 * wave * ramp.reshape(1, 1, size, 1) + ramp / wave)


def _options(**options: Any) -> dict[str, Any]:
    # What every configuration takes, but none names in its signature.
    return options


def gpt2(attention: str = "sdpa") -> Built:
    """GPT-2, 3 layers, dropout everywhere it has one."""
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=48, n_layer=3, n_head=4,
        resid_pdrop=DROPOUT, embd_pdrop=DROPOUT, attn_pdrop=DROPOUT,
        use_cache=False, **SPECIAL_TOKENS, **_options(attn_implementation=attention),
    )  # fmt: skip
    return TrainStep(GPT2LMHeadModel(config), next_token_loss), (text_ids(4, 32),)


def llama(attention: str = "sdpa") -> Built:
    """Llama, 3 layers, grouped-query attention, attention dropout (its only one)."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        attention_dropout=DROPOUT,
        use_cache=False, **SPECIAL_TOKENS, **_options(attn_implementation=attention),
    )  # fmt: skip
    return TrainStep(LlamaForCausalLM(config), next_token_loss), (text_ids(2, 32),)


def mixtral(experts: str = "grouped_mm") -> Built:
    """Mixtral, 2 layers of 4 experts, 2 for each token.

    ``experts="eager"`` loops over the experts that were hit, which is data-dependent and breaks
    the graph; ``"grouped_mm"`` and ``"batched_mm"`` do not. The latter's backward adds into
    the repeated experts' weights from several threads, in no fixed order.
    """
    config = MixtralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        num_local_experts=4, num_experts_per_tok=2, attention_dropout=DROPOUT,
        use_cache=False, **SPECIAL_TOKENS,
        **_options(attn_implementation="sdpa", experts_implementation=experts),
    )  # fmt: skip
    return TrainStep(MixtralForCausalLM(config), next_token_loss), (text_ids(2, 16),)


def bert(attention: str = "sdpa") -> Built:
    """BERT, 2 layers, on text with every 7th character masked (about BERT's 15 %)."""
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=96, max_position_embeddings=32,
        hidden_dropout_prob=DROPOUT, attention_probs_dropout_prob=DROPOUT,
        pad_token_id=None, **_options(attn_implementation=attention),
    )  # fmt: skip
    text = text_ids(4, 24)
    masked = torch.zeros_like(text, dtype=torch.bool)
    masked.view(-1)[::7] = True
    inputs = text.masked_fill(masked, MASK_TOKEN), text.masked_fill(~masked, -100)
    return TrainStep(BertForMaskedLM(config), masked_token_loss), inputs


def vit(attention: str = "sdpa") -> Built:
    """Vision transformer, 2 layers, 16 patches and the class token."""
    config = ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        hidden_dropout_prob=DROPOUT, attention_probs_dropout_prob=DROPOUT,
        image_size=16, patch_size=4, **_options(num_labels=LABELS, attn_implementation=attention),
    )  # fmt: skip
    inputs = images(3, 16), torch.arange(3)
    return TrainStep(ViTForImageClassification(config), label_loss), inputs


def resnet() -> Built:
    """ResNet, 2 stages of 2 basic blocks; batch normalisation mutates running statistics."""
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic",
        **_options(num_labels=LABELS),
    )  # fmt: skip
    inputs = images(4, 32), torch.arange(4)
    return TrainStep(ResNetForImageClassification(config), label_loss), inputs


def llama_16l() -> Built:
    """The larger Llama of the project's memory figures: fp32, no dropout, 53.5 MB of weights.

    Above its start (gradients included) a step peaks at 289.6 MB on CPU under ``aot_eager``
    with activation memory budget 1, at 109.2 MB with 0.3, at 78.3 MB with per-block
    checkpoints.
    """
    config = LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=704, num_hidden_layers=16,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512,
        use_cache=False, **SPECIAL_TOKENS, **_options(attn_implementation="sdpa"),
    )  # fmt: skip
    return _reference(LlamaForCausalLM, config, batch=2, length=512)


def gpt2_12l() -> Built:
    """The larger GPT-2 of the project's memory figures: fp32, no dropout, 39.2 MB of weights.

    Measured as ``llama_16l``: 268.8 MB at budget 1, 72.5 MB with per-block checkpoints.
    """
    config = GPT2Config(
        vocab_size=1000, n_positions=256, n_embd=256, n_layer=12, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        use_cache=False, **SPECIAL_TOKENS, **_options(attn_implementation="sdpa"),
    )  # fmt: skip
    return _reference(GPT2LMHeadModel, config, batch=4, length=256)


def _reference(model: Callable[[Any], nn.Module], config: Any, batch: int, length: int) -> Built:
    make = seeded(lambda: (TrainStep(model(config), next_token_loss), (text_ids(batch, length),)))
    return make()


MODELS: Mapping[str, Callable[[], Built]] = {
    build.__name__: build for build in (gpt2, llama, mixtral, bert, vit, resnet)
}

CASES: tuple[Case, ...] = (
    Case("gpt2", seeded(gpt2), children_of("model.transformer.h"), draws_random=True),
    Case("llama", seeded(llama), children_of("model.model.layers"), draws_random=True),
    Case("mixtral", seeded(mixtral), children_of("model.model.layers"), draws_random=True),
    Case(
        "mixtral-batched-mm",
        seeded(partial(mixtral, "batched_mm")),
        children_of("model.model.layers"),
        bitwise_vs_eager=False,
        bitwise_repeats=False,
        draws_random=True,
    ),
    Case("bert", seeded(bert), children_of("model.bert.encoder.layer"), draws_random=True),
    Case("vit", seeded(vit), children_of("model.vit.layers"), draws_random=True),
    Case(
        "resnet",
        seeded(resnet),
        children_of("model.resnet.encoder.stages.0.layers", "model.resnet.encoder.stages.1.layers"),
        mutates_buffers=True,
    ),
)
