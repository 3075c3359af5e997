"""Functions that change their inputs in place and say so with ``ctx.mark_dirty``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass
from tests.regions.test_reshaped_in_place import WAYS, gradients


class Doubled(torch.autograd.Function):
    """One input, changed by two ops."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.add_(x.detach().clone())
        x.add_(1.0)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Pair(torch.autograd.Function):
    """Two inputs: autograd counts both changes when both ops are long over."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x.mul_(2.0)
        y.mul_(3.0)
        ctx.mark_dirty(x, y)
        return x, y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0] * 2, grads[1] * 3


class Net(nn.Module):
    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.run = nn.Linear(8, 8), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.one(x)).sin()


def pair(h: Tensor) -> Tensor:
    left, right = Pair.apply(h.cos(), h.sin())
    return left.exp() * right + left


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "two ops": Doubled.apply,
    "of a view": lambda h: Doubled.apply(h.view(-1)).view(h.shape),
    "twice": lambda h: Doubled.apply(Doubled.apply(h)),
    "two inputs": pair,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", CHANGES)
def test_gradients(change: str, way: str) -> None:
    torch.manual_seed(0)
    net = Net(CHANGES[change])
    got, plain = gradients(net, lambda x: WAYS[way](net, x)), gradients(net, net)
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


def test_a_change_after_the_region_is_refused_all_the_same() -> None:
    net, kept = Net(lambda h: h), []

    def run(x: Tensor) -> Tensor:
        kept.extend(Pair.apply(net.one(x), net.one(x * 2)))
        return kept[0].sin() + kept[1].sin()

    loss = ckpt_pass.checkpoint(run, torch.randn(4, 8), policy="save-everything").sum()
    with torch.no_grad():
        kept[0].zero_()
    with pytest.raises(RuntimeError, match="in place"):
        loss.backward()
