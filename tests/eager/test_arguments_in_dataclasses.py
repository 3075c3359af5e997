"""A region holds what a dataclass among its arguments holds, and a plan counts it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass


@dataclass
class Notes:
    """What a layer says besides its output."""

    seen: Tensor | None = None
    parts: list[Any] = field(default_factory=list)


@dataclass
class State:
    h: Tensor
    notes: Notes


class Layer(nn.Module):
    def __init__(self, deep: bool) -> None:
        super().__init__()
        self.up, self.down, self.deep = nn.Linear(16, 64), nn.Linear(64, 16), deep

    def forward(self, state: State) -> State:
        h = self.down(torch.nn.functional.gelu(self.up(state.h)))
        notes = Notes(parts=[{"h": h.detach()}]) if self.deep else Notes(h.detach())
        return State(state.h + h, notes)


class Net(nn.Module):
    def __init__(self, deep: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(deep) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        state = State(x, Notes())
        for layer in self.layers:
            state = layer(state)
        return state.h.square().mean()


@pytest.mark.parametrize("deep", [False, True])
def test_what_dataclasses_hold_is_in_the_peak(deep: bool) -> None:
    torch.manual_seed(0)
    model, x = Net(deep), torch.randn(128, 16)
    with pytest.raises(ckpt_pass.InfeasibleBudgetError) as refused:
        ckpt_pass.plan(model, x, budget=16, mode="eager")
    least = refused.value.least_feasible_bytes
    plan = ckpt_pass.plan(model, x, budget=least, mode="eager")
    assert plan.regions
    with plan.applied(model):
        peak = ckpt_pass.measure_step(lambda: model(x), repeats=1).peak_bytes
    assert plan.peak_bytes is not None
    assert 0 <= plan.peak_bytes - peak <= 128
