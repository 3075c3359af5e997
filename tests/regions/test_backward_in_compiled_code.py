"""A backward that compiled code calls: dynamo leaves the recomputation of eager regions alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd

import ckpt_pass


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16)) for _ in range(3)
        )

    def loss(self, x: Tensor, around: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
        for layer in self.layers:
            x = around(layer, x)
        return x.sum()


def bare(layer: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = layer(x)
    return found


def region(layer: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = ckpt_pass.checkpoint(layer, x)
    return found


def region_with_policy(layer: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = ckpt_pass.checkpoint(layer, x, policy="save-matmul")
    return found


def gradients(model: nn.Module, run: Callable[[], None]) -> list[Tensor | None]:
    for _ in range(2):
        model.zero_grad()
        run()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("way", [region, region_with_policy])
def test_a_compiled_step_whose_forward_is_eager(way: Callable[..., Tensor]) -> None:
    torch._dynamo.reset()
    model, x = Blocks(), torch.randn(32, 16)
    expected = gradients(model, lambda: model.loss(x, bare).backward())
    forward = torch.compiler.disable(lambda: model.loss(x, way))
    step = torch.compile(lambda: forward().backward(), backend="aot_eager")
    found = gradients(model, step)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("way", [region, region_with_policy])
def test_compiled_autograd_of_an_eager_model(way: Callable[..., Tensor]) -> None:
    torch._dynamo.reset()
    model, x = Blocks(), torch.randn(32, 16)
    expected = gradients(model, lambda: model.loss(x, bare).backward())

    def run() -> None:
        with compiled_autograd._enable(torch.compile(backend="eager")):
            model.loss(x, way).backward()

    found = gradients(model, run)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
