"""An op that fills, for its backward, an argument that autograd has saved before it ran."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import ckpt_pass
from ckpt_pass import recompute, save

KEPT = save(op="aten.rrelu_with_noise") | recompute()


class Leaky(nn.Module):
    """Ends with random slopes, which lie in memory that is empty when autograd saves it."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.up, self.leak = nn.Linear(8, 8), nn.RReLU(inplace=inplace)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.leak(self.up(x))


def torchs(layer: nn.Module, x: Tensor, **named: Any) -> Any:
    return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False, **named)


@pytest.mark.parametrize(
    "way",
    [
        ckpt_pass.checkpoint,
        lambda layer, x: ckpt_pass.checkpoint(layer, x, policy=KEPT),
        lambda layer, x: torchs(layer, x, context_fn=ckpt_pass.context_fn(KEPT)),
        lambda layer, x: torchs(layer, x, context_fn=ckpt_pass.context_fn("save-matmul")),
    ],
    ids=["region", "policy", "context_fn", "context_fn that keeps another"],
)
def test_the_recomputation_fills_it(way: Callable[[nn.Module, Tensor], Tensor]) -> None:
    layer, x = Leaky(), torch.randn(4, 8)
    for _ in range(2):  # the first run is looked at
        ckpt_pass.compare_gradients(
            lambda: layer(x).sum(), lambda: way(layer, x).sum(), layer
        ).raise_if_different()


@pytest.mark.parametrize(
    "policy",
    [save(), ckpt_pass.offload(), save(op="aten.rrelu_with_noise_") | recompute()],
    ids=["kept", "moved", "the op kept"],
)
def test_what_is_changed_in_place_and_kept_does_not_stand_for_what_else_is_filled(
    policy: ckpt_pass.Policy,
) -> None:
    layer, x = Leaky(inplace=True), torch.randn(4, 8)
    for _ in range(2):
        ckpt_pass.compare_gradients(
            lambda: layer(x).sum(),
            lambda: ckpt_pass.checkpoint(layer, x, policy=policy).sum(),
            layer,
        ).raise_if_different()


@pytest.mark.parametrize("policy", [save(), ckpt_pass.offload()], ids=["kept", "moved"])
def test_memory_that_the_region_resizes(policy: ckpt_pass.Policy) -> None:
    def step(x: Tensor) -> Tensor:
        made = torch.empty(0)
        made.resize_(*x.shape).copy_(x.detach())
        return x * made

    x = torch.randn(4, 8, requires_grad=True)
    ckpt_pass.checkpoint(step, x, policy=policy).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, x.detach())


def test_a_plan_of_it() -> None:
    model = nn.Sequential(nn.Linear(8, 8), *(Leaky() for _ in range(3)))
    x = torch.randn(64, 8)
    loss_fn = torch.sum
    with pytest.raises(ckpt_pass.InfeasibleBudgetError) as error:
        ckpt_pass.plan(model, x, budget=1, mode="eager", loss_fn=loss_fn)
    least = error.value.least_feasible_bytes
    ckpt_pass.verify(model, x, budget=least, mode="eager", loss_fn=loss_fn).raise_if_failed()
