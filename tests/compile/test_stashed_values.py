"""Values that a Function keeps on ``ctx``, and not with ``save_for_backward``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass
from tests.zoo import assert_same_step, run_step


class Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.gate = torch.exp(-x.square())
        ctx.save_for_backward(weight)
        return ctx.gate * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (weight,) = ctx.saved_tensors
        return grad * ctx.gate * weight, (grad * ctx.gate).sum(0)


class Tripled(torch.autograd.Function):
    """Reads its result as it is when the backward comes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.result = x * 3
        return ctx.result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.result


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.weights = nn.ParameterList(torch.rand(16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer, weight in zip(self.layers, self.weights, strict=True):
            x = x + Gated.apply(layer(x), weight)
        return x.square().mean()


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize("budget", [0.8, 0.55])
@pytest.mark.parametrize("link", [False, True])
def test_they_are_freed_when_they_were_read(net: Net, budget: float, link: bool) -> None:
    x = torch.randn(256, 16)
    plain = run_step(net, (x,))
    offload = ckpt_pass.Offload(d2h_bytes_per_s=1e9, h2d_bytes_per_s=1e9) if link else None
    backend = ckpt_pass.make_backend(budget=budget, inner="aot_eager", offload=offload)
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    assert_same_step(run_step(net, (x,), compiled), plain)
    measured = ckpt_pass.measure_step(lambda: compiled(x), repeats=1, params=list(net.parameters()))
    (plan,) = backend.plans
    assert plan.budget_bytes is not None
    assert measured.peak_bytes == plan.peak_bytes <= plan.budget_bytes


def test_what_the_caller_has_as_well_may_change() -> None:
    """As in a plain step, which looks at no version here, either."""
    x = torch.randn(4, requires_grad=True)

    def gradient(run: Any) -> Tensor:
        out = run(x)
        with torch.no_grad():
            out.mul_(2)
        return torch.autograd.grad(out.sum(), x)[0]

    def fn(x: Tensor) -> Tensor:
        return Tripled.apply(x.sin())  # type: ignore[no-any-return]

    backend = ckpt_pass.make_backend("save-everything", inner="aot_eager")
    assert torch.equal(gradient(torch.compile(fn, backend=backend)), gradient(fn))
