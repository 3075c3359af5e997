"""Caches of keys that a decoder fills in training: what eager plans count of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import ckpt_pass
from ckpt_pass.eager.prediction import predictor
from ckpt_pass.regions.wrapping import RegionSpec, applied_regions

LAYERS = 4


class Decoder(nn.Module):
    """A decoder; most is alive after its last layer, while the cache is still there."""

    def __init__(self) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
        )
        self.model = LlamaForCausalLM(config)

    def forward(self, ids: Tensor) -> Tensor:
        found = self.model(ids)  # holds the cache
        with torch.no_grad():
            largest = found.logits.repeat(6, 1, 1).amax()
        loss: Tensor = nn.functional.cross_entropy(found.logits.flatten(0, 1), ids.flatten())
        return loss / largest


def test_keys_that_a_region_lets_go_are_not_counted_after_it() -> None:
    torch.manual_seed(0)
    model, ids = Decoder(), torch.randint(0, 512, (2, 64))
    recorded = predictor(model, (ids,))
    for chosen in ([], [0], [0, 1, 2], [*range(LAYERS)]):
        names = [f"model.model.layers.{number}" for number in chosen]
        predicted = recorded.predict([([name], None) for name in names])
        assert predicted is not None
        with applied_regions(model, dict.fromkeys(names, RegionSpec())):
            measured = ckpt_pass.measure_step(lambda: model(ids), repeats=1)
        assert measured.peak_bytes == predicted.peak_bytes, chosen
