"""Steps on jagged nested tensors, whose ops are those of what they are made of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass


class Jagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(2)
        )

    def forward(self, values: Tensor, offsets: Tensor) -> Tensor:
        x = torch.nested.nested_tensor_from_jagged(values, offsets)
        for layer in self.layers:
            x = x + layer(x)
        return x.values().square().mean()


@pytest.mark.filterwarnings("error::ckpt_pass.UnclassifiedOpWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_measured_verified_and_planned() -> None:
    model, inputs = Jagged(), (torch.randn(30, 16), torch.tensor([0, 7, 12, 30]))
    model(*inputs).backward()  # the offsets are known to be some from here on
    step = ckpt_pass.measure_step(lambda: model(*inputs), repeats=1)
    assert step.flops == 3 * 2 * 2 * (2 * 30 * 16 * 64) - 2 * 30 * 16 * 64
    ckpt_pass.verify(model, *inputs, policy="save-nothing", mode="eager").raise_if_failed()
    plan = ckpt_pass.plan(model, *inputs, budget=1.0)
    assert plan.peak_bytes
