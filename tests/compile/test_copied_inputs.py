"""Copies that a step makes of what changes before the backward, as MoCo does of its queue."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass


class Contrast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.register_buffer("queue", torch.randn(8, 32))

    def forward(self, x: Tensor) -> Tensor:
        keys: Any = self.queue
        return (self.encoder(x) @ keys.T.clone().detach().T).tanh().square().mean()


def gradients(backend: Any) -> list[Tensor]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, x = Contrast(), torch.randn(64, 8)
    loss = (torch.compile(model, backend=backend) if backend else model)(x)
    queue: Any = model.queue
    queue[:, :4] = 1.0
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("how", [{"policy": "save-nothing"}, {"budget": 0.8}, {"budget": 1.0}])
def test_a_copy_of_an_input_is_saved(how: dict[str, Any]) -> None:
    found = gradients(ckpt_pass.make_backend(**how, inner="aot_eager"))
    assert all(map(torch.equal, found, gradients(None)))


def test_a_plan_says_why() -> None:
    torch.manual_seed(0)
    model, x = Contrast(), torch.randn(64, 8)
    assert "a copy of an input" in str(ckpt_pass.explain(model, x, policy="save-nothing"))
