"""Plans for inductor, made ahead of time: the code's own peak, carried out again to the byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import ckpt_pass


class Small(nn.Sequential):
    """Two blocks, random ops and a table of constants among them, and a loss."""

    def __init__(self) -> None:
        super().__init__(
            *(
                layer
                for _ in range(2)
                for layer in (nn.Linear(32, 32), nn.GELU(), nn.Dropout(0.1), nn.LayerNorm(32))
            )
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = torch.tensor([1.0, 2.0]).repeat(16)
        found: torch.Tensor = (super().forward(x) * scale).square().mean()
        return found


def test_a_plan_ahead_is_the_step_to_the_byte_from_a_file_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Small(), torch.randn(64, 32)
    plan = ckpt_pass.plan(model, x, budget=0.6, inner="inductor")
    with torch.device("meta"):
        step = Small(), torch.randn(64, 32)
    on_paper = ckpt_pass.plan(*step, budget=0.6, inner="inductor")
    assert plan.budget_bytes is not None
    assert on_paper.peak_bytes == plan.peak_bytes <= plan.budget_bytes
    assert plan.inner == "inductor" and "generated code" in plan.summary()

    backend = ckpt_pass.make_backend(plan=plan.save(tmp_path / "plan.json"))
    assert backend.inner == "inductor"
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    measured = ckpt_pass.measure_step(lambda: compiled(x), repeats=1, params=model.parameters())
    assert measured.peak_bytes == backend.plans[-1].peak_bytes == plan.peak_bytes


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv3d(1, 8, 3, padding=1), nn.Conv3d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = nn.functional.avg_pool3d(nn.functional.leaky_relu(self.first(x)), 2)
        found: torch.Tensor = self.second(h).square().mean()
        return found


def test_what_the_shape_is_read_of_is_not_saved() -> None:
    """Inductor's code for the pooling's backward reads no value of the pooling's input.

    Torch reaches 598,728 bytes at its ``activation_memory_budget=0`` with one thread, 621,192 with
    two; with the input saved the least was 795,336.
    """
    torch.manual_seed(0)
    model, x = Pooled(), torch.randn(2, 1, 12, 16, 16)
    plan = ckpt_pass.plan(model, x, budget=640_000, inner="inductor")
    assert plan.peak_bytes is not None and plan.peak_bytes <= 640_000
    compiled = torch.compile(model, backend=ckpt_pass.make_backend(plan=plan))
    compiled(x).backward()
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    model(x).backward()
    assert all(torch.allclose(a, p.grad) for a, p in zip(found, model.parameters(), strict=True))


def test_verify_runs_a_plan_with_what_it_was_made_for() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
    step = (model, torch.randn(64, 32))
    loss = {"loss_fn": lambda y: y.square().mean()}
    plan = ckpt_pass.plan(*step, policy="save-matmul", inner="inductor", **loss)
    assert ckpt_pass.verify(*step, plan=plan, rtol=1e-4, atol=1e-7, **loss).ok


def test_what_compiles_is_named() -> None:
    for tool in (ckpt_pass.plan, ckpt_pass.verify):
        with pytest.raises(ckpt_pass.PlanModeError, match="inner=None, expected one of"):
            tool(Small(), torch.randn(4, 32), budget=1.0, inner=None)
    with pytest.raises(ckpt_pass.UnknownOptionError, match="inner=None, expected one of"):
        ckpt_pass.sweep(Small(), torch.randn(4, 32), inner=None)
    with pytest.raises(ckpt_pass.UnknownOptionError, match="of type list, expected a mapping"):
        ckpt_pass.make_backend(inner_options=["max_autotune"])


def test_refusals() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layer(x)
            torch._dynamo.graph_break()
            return self.layer(x).sum()

    with pytest.raises(ckpt_pass.SeveralGraphsError, match="cuts"):
        ckpt_pass.plan(Cut(), torch.randn(2, 8), budget=1.0, inner="inductor", dynamic=True)
    with pytest.raises(ckpt_pass.InfeasibleBudgetError, match="peak of 1 bytes"):
        ckpt_pass.plan(Small(), torch.randn(64, 32), budget=1, inner="inductor")
    with pytest.raises(ckpt_pass.PlanModeError, match="inductor"):
        ckpt_pass.plan(Cut(), torch.randn(2, 8), budget=1.0, inner="induktor")
    with pytest.raises(ckpt_pass.PlanModeError, match="inner="):
        ckpt_pass.plan(Cut(), torch.randn(2, 8), budget=1.0, inner="inductor", mode="eager")
