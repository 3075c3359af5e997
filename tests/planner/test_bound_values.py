"""Values that must be saved if they are read: every plan that is considered saves them."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

import ckpt_pass
from ckpt_pass.planner.exact import broken_rule
from ckpt_pass.planner.problem import Problem
from ckpt_pass.planner.solution import Solution
from ckpt_pass.planner.solve import Pool, solve_from


class Layer(nn.Module):
    """A normalisation that runs again reads what its statistics were: a copy, made first of all."""

    def __init__(self) -> None:
        super().__init__()
        self.product, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.norm(self.product(x))) + x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def test_layers_that_decide_differently_save_what_any_of_them_needs() -> None:
    seen: list[str | None] = []

    def solver(problem: Problem, budget_bytes: int, borders: Collection[int]) -> Solution:
        pool = Pool(problem, borders)
        assert problem.bound and any("chain" in plan.solver for plan in pool.plans.values())
        seen.extend(broken_rule(problem, plan) for plan in pool.plans.values())
        return solve_from(pool, budget_bytes)

    x = torch.randn(4, 8, 8, 8, requires_grad=True).to(memory_format=torch.channels_last)
    net = Net().to(memory_format=torch.channels_last)
    ckpt_pass.plan(net, x, budget=0.9, solver=solver)
    assert seen and set(seen) == {None}


def test_the_least_budget_with_a_link() -> None:
    net, x = Net(), torch.randn(4, 8, 8, 8, requires_grad=True)
    link = ckpt_pass.Offload(min_bytes=1, d2h_bytes_per_s=3e9, h2d_bytes_per_s=2e9)
    try:
        ckpt_pass.plan(net, x, budget=0.01, offload=link)
    except ckpt_pass.InfeasibleBudgetError as error:
        least = error.least_feasible_bytes
    assert ckpt_pass.plan(net, x, budget=least, offload=link).peak_bytes <= least
