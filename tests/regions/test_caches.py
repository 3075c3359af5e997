"""Caches of keys and values in regions: the same step to the last bit, and nothing held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration

import ckpt_pass
from tests.zoo import Built, hf, run_step, seeded


class _Translation(nn.Module):
    """A decoder with two caches: of itself, and of what it reads."""

    def __init__(self) -> None:
        super().__init__()
        config = BartConfig(
            vocab_size=hf.VOCAB, d_model=32, encoder_layers=1, decoder_layers=3,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
            decoder_ffn_dim=64, max_position_embeddings=32, bos_token_id=1, eos_token_id=2,
            pad_token_id=0, decoder_start_token_id=1,
        )  # fmt: skip
        self.model = BartForConditionalGeneration(config)

    def forward(self, ids: Tensor) -> Tensor:
        loss: Tensor = self.model(ids, labels=ids, use_cache=True).loss
        return loss


def _caching(build: Any) -> Any:
    def make() -> Built:
        module, inputs = build()
        module.model.config.use_cache = True
        return module, inputs

    return seeded(make)


MODELS = {
    "gpt2": _caching(hf.gpt2),  # hands the cache over by position
    "llama": _caching(hf.llama),  # by name
    "bart": seeded(lambda: (_Translation(), (hf.text_ids(2, 16),))),
}
PLACEMENTS = {
    "layers": "all",
    "attention": ckpt_pass.Custom(lambda module: hasattr(module, "layer_idx")),
}


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_layer_fills_a_cache_of_its_own(make: Any, placement: Any) -> None:
    module, inputs = make()
    plain = run_step(module, inputs)
    ckpt_pass.apply(module, placement)
    ours = run_step(module, inputs)
    assert torch.equal(ours.loss, plain.loss)
    for name, gradient in plain.gradients.items():
        assert torch.equal(ours.gradients[name], gradient), name


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_nothing_of_a_cache_is_held(name: str) -> None:
    saved = []
    for build in (MODELS[name], seeded(getattr(hf, name))):
        module, inputs = build()
        ckpt_pass.apply(module, "all")
        measured = ckpt_pass.measure_step(lambda m=module, i=inputs: m(*i), repeats=1)
        saved.append(measured.saved_bytes)
    assert saved[0] == saved[1]


def test_an_eager_plan_is_of_the_step_with_its_cache() -> None:
    module, inputs = MODELS["gpt2"]()
    plain = run_step(module, inputs)
    module.zero_grad()
    plan = ckpt_pass.plan(module, *inputs, mode="eager", budget=0.6)
    plan.apply(module)
    ours = run_step(module, inputs)
    assert all(torch.equal(ours.gradients[n], g) for n, g in plain.gradients.items())
    measured = ckpt_pass.measure_step(lambda: module(*inputs), repeats=1)
    assert measured.peak_bytes <= plan.budget_bytes
    assert measured.peak_bytes == pytest.approx(plan.peak_bytes, rel=0.01)
