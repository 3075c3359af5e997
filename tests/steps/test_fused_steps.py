"""Steps that dynamo cuts, planned together, whose graphs inductor compiles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass
from tests.steps.test_step_plans import Block, cut, loop
from tests.zoo import Built, run_step


class Tables(nn.Module):
    """A graph without a backward, one with one, and code between them that saves what it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.arange(512.0))
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        table = (self.steps[:, None] * self.steps[None, :32]).cos()
        torch._dynamo.graph_break()
        x = self.blocks(x + table)
        torch._dynamo.graph_break()
        return x.square().mean()


class Alias(nn.Module):
    """A value and a view of it come over a break, and one of them is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        v = y.view(-1)
        torch._dynamo.graph_break()
        v.add_(1.0)
        return (self.layer(y).sin() * v.view(-1, 32)).sum()


def alias() -> Built:
    torch.manual_seed(0)
    return Alias(), (torch.randn(256, 32),)


def tables() -> Built:
    torch.manual_seed(0)
    return Tables(), (torch.randn(512, 32),)


def planned(make: Callable[[], Built], budget: float | int) -> ckpt_pass.StepPlan:
    torch._dynamo.reset()
    model, inputs = make()
    plan = ckpt_pass.plan(model, *inputs, budget=budget, inner="inductor")
    assert isinstance(plan, ckpt_pass.StepPlan)
    assert all(part.inner == "inductor" for part in plan.parts)
    return plan


def measured(make: Callable[[], Built], plan: ckpt_pass.StepPlan | Path) -> int:
    """The peak of the step that carries a plan out; its gradients are near the plain one's."""
    model, inputs = make()
    expected = run_step(*make())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=ckpt_pass.make_backend(plan=plan))
    found = run_step(model, inputs, forward=compiled)
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-4, atol=1e-6)
    model.zero_grad(set_to_none=True)
    return ckpt_pass.measure_step(lambda: compiled(*inputs), repeats=1).peak_bytes


def test_the_whole_step_is_within_the_budget(tmp_path: Path) -> None:
    plan = planned(tables, 0.7)
    assert len(plan.parts) == 2  # the table has no backward
    assert plan.budget_bytes == int(0.7 * plan.plain_peak_bytes)
    path = plan.save(tmp_path / "plan.json")
    assert measured(tables, path) == plan.peak_bytes <= plan.budget_bytes


@pytest.mark.slow
@pytest.mark.parametrize("make", [loop, tables], ids=["loop", "tables"])
def test_a_refusal_names_what_can_be_met(make: Callable[[], Built]) -> None:
    with pytest.raises(ckpt_pass.InfeasibleBudgetError) as caught:
        planned(make, 1)
    least = caught.value.least_feasible_bytes
    plan = planned(make, least)
    assert measured(make, plan) == plan.peak_bytes <= least < plan.plain_peak_bytes


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["twice", "apart", "looks"])
def test_cuts_of_all_kinds(kind: str) -> None:
    """Inductor draws other dropout: gradients are compared elsewhere."""
    make = cut(kind)
    plan = planned(make, 0.5)
    torch._dynamo.reset()
    model, inputs = make()
    compiled = torch.compile(model, backend=ckpt_pass.make_backend(plan=plan))
    compiled(*inputs).backward()
    model.zero_grad(set_to_none=True)
    peak = ckpt_pass.measure_step(lambda: compiled(*inputs), repeats=1).peak_bytes
    assert plan.budget_bytes is not None
    assert peak == plan.peak_bytes <= plan.budget_bytes


@pytest.mark.slow
def test_values_that_share_memory_over_a_break() -> None:
    plan = planned(alias, 1.0)
    assert measured(alias, plan) == plan.peak_bytes


@pytest.mark.slow
def test_a_policy_alone_and_verify() -> None:
    model, inputs = tables()
    plan = ckpt_pass.plan(model, *inputs, policy="save-matmul", inner="inductor")
    assert isinstance(plan, ckpt_pass.StepPlan) and plan.budget_bytes is None
    assert measured(tables, plan) == plan.peak_bytes
    assert ckpt_pass.verify(model, *inputs, plan=plan, rtol=1e-4, atol=1e-6).ok
