"""Ops that run graphs of their own: ``torch.cond`` and its like, and nested regions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass

WIDTH, ROWS = 16, 512


class Branching(nn.Module):
    """One of two paths, by a value."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.other, self.down = (
            nn.Linear(WIDTH, 64),
            nn.Linear(WIDTH, 64),
            nn.Linear(64, WIDTH),
        )

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = torch.cond(
            x.mean() > 0,
            lambda x: self.down(self.up(x).tanh().sin()),
            lambda x: self.down(self.other(x).sigmoid().cos()),
            (x,),
        )
        return x + made


class Nested(nn.Module):
    """Traced once for all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)

    @torch.compiler.nested_compile_region
    def inner(self, x: Tensor) -> Tensor:
        made: Tensor = self.down(self.up(x).tanh().sin())
        return made


class Layers(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        count = 1 if kind is Branching else 3  # dynamo takes seconds for each branch
        self.layers = nn.ModuleList(kind() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def least_plan(model: nn.Module, x: Tensor) -> ckpt_pass.Plan:
    with pytest.raises(ckpt_pass.InfeasibleBudgetError) as error:
        ckpt_pass.plan(model, x, budget=1)
    plan = ckpt_pass.plan(model, x, budget=error.value.least_feasible_bytes)
    assert isinstance(plan, ckpt_pass.Plan)
    return plan


@pytest.mark.parametrize("kind", [Branching, Nested])
def test_least_budget(kind: type[nn.Module]) -> None:
    """What a branch holds inside is in the peak; a nested region's ops are the step's own."""
    torch.manual_seed(0)
    model, x = Layers(kind), torch.randn(ROWS, WIDTH)
    plan = least_plan(model, x)
    compiled = torch.compile(model, backend=ckpt_pass.make_backend(plan=plan))
    step = ckpt_pass.measure_step(lambda: compiled(x), repeats=1)
    assert step.peak_bytes == plan.peak_bytes == plan.budget_bytes
    torch_own = torch.compile(model, backend="aot_eager")
    ckpt_pass.compare_gradients(
        lambda: torch_own(x), lambda: compiled(x), model
    ).raise_if_different()


def test_modules_of_nested_regions() -> None:
    """Dynamo traces the first call; ops of the others are in the modules that were called."""
    x = torch.randn(ROWS, WIDTH)
    policy = ckpt_pass.recompute(module="layers.1.*") | ckpt_pass.save()
    plan = ckpt_pass.plan(Layers(Nested), x, policy=policy)
    assert isinstance(plan, ckpt_pass.Plan)
    tanhs = [d for d in plan.decisions if d.site.op == "aten.tanh.default"]
    assert [d.site.fqn for d in tanhs] == ["layers.0", "layers.1", "layers.2"]
    assert "layers.2.down" in {d.site.fqn for d in plan.decisions}
