"""Hooks before a forward change what it is given: a region holds what they return."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass

LAYERS, WIDTH, ROWS = 4, 32, 256


class Layer(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 2 * WIDTH, dtype=dtype)
        self.inner = nn.Sequential(nn.GELU(), nn.Linear(2 * WIDTH, 2 * WIDTH, dtype=dtype))
        self.last = nn.Linear(2 * WIDTH, WIDTH, dtype=dtype)

    def forward(self, x: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        hidden = self.inner(self.first(x) + bias).sigmoid()
        found: Tensor = (x + self.last(hidden)).float()
        return found


def replaces(_module: nn.Module, args: Any, _kwargs: Any) -> tuple[Any, Any]:
    return (args[0] * 1.5,), {"bias": 1.1}


def adds(_module: nn.Module, args: Any, _kwargs: Any) -> tuple[Any, Any]:
    return args, {"bias": torch.ones(ROWS, 2 * WIDTH) / 3}


def casts(_module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return tuple(value.bfloat16() for value in args), kwargs


@pytest.mark.parametrize(
    ("hook", "dtype"),
    [(replaces, torch.float32), (adds, torch.float32), (casts, torch.bfloat16)],
)
@pytest.mark.parametrize("budget", [0.8, 0.6, 0.4, 1])
def test_what_hooks_return_is_counted(
    hook: Callable[..., Any], dtype: torch.dtype, budget: float
) -> None:
    model = nn.Sequential(*(Layer(dtype) for _ in range(LAYERS)))
    for layer in model:
        layer.register_forward_pre_hook(hook, with_kwargs=True)
    x = torch.randn(ROWS, WIDTH)

    def loss(out: Tensor) -> Tensor:
        return out.square().mean()

    def planned(budget: float) -> ckpt_pass.Plan:
        plan = ckpt_pass.plan(model, x, budget=budget, mode="eager", loss_fn=loss)
        assert isinstance(plan, ckpt_pass.Plan)
        return plan

    try:
        plan = planned(budget)
    except ckpt_pass.InfeasibleBudgetError as error:
        plan = planned(error.least_feasible_bytes)
    with plan.applied(model) if plan.regions else contextlib.nullcontext():
        step = ckpt_pass.measure_step(lambda: loss(model(x)), repeats=1)
    assert plan.budget_bytes is not None
    assert step.peak_bytes <= plan.peak_bytes <= plan.budget_bytes
    # Numbers in float32 (1.5, 1.1), and a bias's gradient: 256 bytes at most.
    assert plan.peak_bytes - step.peak_bytes <= 256 + 4 * LAYERS
