"""Numbers that autograd holds as tensors: eight bytes each, where a gradient needs them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ckpt_pass


class Scaled(nn.Module):
    """Products and quotients by Python's numbers, in place too; half of them without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = torch.tanh(h * 1.5)
        h = torch.sin(h / 3)
        h *= 0.7
        h = h + 1
        h /= 1.25
        mask = x.sign().mul_(0.5).div_(2.0)
        mask = mask * 3 / 4
        with torch.no_grad():
            scale = h.detach().mul(2.0).div(5.0).mean()
        return (self.last(h + mask) * scale).square().mean()


def test_numbers_held_by_autograd() -> None:
    torch.manual_seed(0)
    model, x = Scaled(), torch.randn(64, 24)
    plan = ckpt_pass.plan(model, x, mode="eager", budget=1.0)
    plan.apply(model)
    measured = ckpt_pass.measure_step(lambda: model(x), repeats=1)
    assert measured.peak_bytes == plan.peak_bytes
