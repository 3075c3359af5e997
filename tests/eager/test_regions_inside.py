"""Models with regions of their own: the states of random numbers that these keep count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import ckpt_pass

Run = Callable[[nn.Module, Tensor], Tensor]
WAYS: dict[str, Run] = {
    "torch": lambda layer, x: torch_checkpoint(layer, x, use_reentrant=False),
    "ours": lambda layer, x: ckpt_pass.checkpoint(layer, x),
}


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(32, 128), nn.Linear(128, 32), dropout

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.down(F.gelu(self.up(x))), self.dropout)


class EveryOther(nn.Module):
    """Every other block is a region."""

    def __init__(self, run: Run, dropout: float) -> None:
        super().__init__()
        self.run = run
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = self.run(block, x) if index % 2 else block(x)
        return x.square().mean()


class Cut(EveryOther):
    """Dynamo leaves the regions to Python."""

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = self.apart(block, x) if index % 2 else block(x)
        return x.square().mean()

    @torch._dynamo.disable
    def apart(self, block: nn.Module, x: Tensor) -> Tensor:
        return self.run(block, x)


def measured(step: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> int:
    found: Any = ckpt_pass.measure_step(lambda: step(x), repeats=1, params=model.parameters())
    return int(found.peak_bytes)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("way", WAYS)
def test_an_eager_plan_is_exact(way: str, dropout: float) -> None:
    torch.manual_seed(0)
    model, x = EveryOther(WAYS[way], dropout), torch.randn(64, 32)
    for budget in (1.0, 0.85):
        plan = ckpt_pass.plan(model, x, mode="eager", budget=budget)
        assert plan.budget_bytes is not None
        before = torch.get_rng_state()
        with plan.applied(model):
            assert measured(model, model, x) == plan.peak_bytes <= plan.budget_bytes
        torch.set_rng_state(before)


@pytest.mark.parametrize("way", WAYS)
def test_a_plan_of_several_graphs_is_exact(way: str) -> None:
    torch.manual_seed(0)
    model, x = Cut(WAYS[way], 0.1), torch.randn(64, 32)
    plan = ckpt_pass.plan(model, x, budget=0.95)
    compiled = torch.compile(model, backend=ckpt_pass.make_backend(plan=plan))
    assert plan.budget_bytes is not None
    assert measured(compiled, model, x) == plan.peak_bytes <= plan.budget_bytes


def test_planning_draws_nothing_and_leaves_torchs_functions() -> None:
    torch.manual_seed(0)
    before, read = torch.get_rng_state(), torch.get_rng_state
    ckpt_pass.plan(EveryOther(WAYS["torch"], 0.1), torch.randn(8, 32), mode="eager", budget=1.0)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    torch.manual_seed(0)
    EveryOther(WAYS["torch"], 0.1), torch.randn(8, 32)
    assert torch.equal(after, torch.get_rng_state())
    assert torch.get_rng_state is read is torch.random.get_rng_state
