"""The loop closed over inductor's own schedule."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import ckpt_pass
from tests.zoo import hf, loss_of

SIX = ("gpt2", "llama", "mixtral", "bert", "vit", "resnet")


class Net(nn.Module):
    def __init__(self, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + nn.functional.gelu(layer(x)).sin()
        return x.square().mean()


@pytest.mark.parametrize("fraction", [0.55, pytest.param(0.8, marks=pytest.mark.slow)])
def test_met_or_said(fraction: float) -> None:
    net, x = Net(), torch.randn(512, 64)
    expected = net(x)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    backend = ckpt_pass.make_backend(budget=fraction, inner="inductor")
    compiled = torch.compile(net, backend=backend)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step = ckpt_pass.measure_step(lambda: compiled(x), repeats=1)
    (plan,) = backend.plans
    assert plan.inner_peak_bytes is not None and plan.budget_bytes is not None
    said = [w for w in caught if w.category is ckpt_pass.InductorPeakWarning]
    assert bool(said) == (plan.inner_peak_bytes > plan.budget_bytes)
    if said:
        assert f"{plan.inner_peak_bytes:,}" in str(said[0].message)
        assert f"{plan.budget_bytes:,}" in str(said[0].message)
    else:
        assert step.peak_bytes <= plan.budget_bytes
    assert "by its own schedule" in str(plan)
    net.zero_grad()
    compiled(x).backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_workspaces_and_copies_in_other_layouts_are_counted() -> None:
    class Convolved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x).relu()).square().mean()

    net = Convolved()
    x = torch.randn(2, 3, 16, 16)
    backend = ckpt_pass.make_backend(budget="1GiB", inner="inductor")
    compiled = torch.compile(net, backend=backend)
    step = ckpt_pass.measure_step(lambda: compiled(x), repeats=1)
    told = backend.plans[0].inner_peak_bytes
    assert told is not None and step.peak_bytes <= told <= 1.2 * step.peak_bytes


def test_a_graph_without_a_backward_has_no_plan() -> None:
    net, x = Net(), torch.randn(8, 64)
    backend = ckpt_pass.make_backend(budget=0.5, inner="inductor")
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net, backend=backend)(x), net(x))
    assert not backend.plans


@pytest.mark.slow
@pytest.mark.parametrize("part", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("name", SIX)
def test_the_models_keep_to_their_budgets(name: str, part: float) -> None:
    """Part of the way from the least feasible peak to that of no recomputation."""
    model, inputs = getattr(hf, name)()
    with pytest.raises(ckpt_pass.InfeasibleBudgetError) as caught_least:
        ckpt_pass.plan(model, *inputs, budget=1)
    least = caught_least.value.least_feasible_bytes
    most = ckpt_pass.plan(model, *inputs, budget=1.0).peak_bytes
    assert isinstance(most, int)
    budget = int(least + part * (most - least))
    torch._dynamo.reset()
    backend = ckpt_pass.make_backend(budget=budget, inner="inductor")
    compiled = torch.compile(model, backend=backend)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step = ckpt_pass.measure_step(lambda: loss_of(compiled(*inputs)), repeats=1)
    (plan,) = backend.plans
    said = [w for w in caught if w.category is ckpt_pass.InductorPeakWarning]
    print(
        f"inductor {name} {part}: budget {budget:,}, its own schedule {plan.inner_peak_bytes:,}, "
        f"measured {step.peak_bytes:,}, planned again {plan.replans} times, warned {bool(said)}"
    )
    assert said or step.peak_bytes <= budget
