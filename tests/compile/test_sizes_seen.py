"""Budgets over batches of several sizes, as a loader without ``drop_last`` makes them."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass

WHOLE, LAST = 512, 37


class Net(nn.Module):
    """Steps of short batches are another graph if there is a ``limit``."""

    def __init__(self, limit: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.limit = limit

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + nn.functional.gelu(layer(x)).sin()
        if len(x) < self.limit:
            x = x * 2
        return (x.square().mean(1) * weights).mean()


def batch(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 64), torch.rand(rows)


def peak_of(model: nn.Module, compiled: object, rows: int) -> int:
    assert callable(compiled)
    given = batch(rows)
    leaves = list(model.parameters())
    return ckpt_pass.measure_step(lambda: compiled(*given), params=leaves, repeats=1).peak_bytes


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("budget", [0.6, 900_000])
def test_a_smaller_batch_leaves_the_budget_of_the_others(inner: str, budget: float | int) -> None:
    """Dynamo runs whole batches in its newest graph, with open sizes, from then on."""
    torch._dynamo.reset()
    model = Net()
    backend = ckpt_pass.make_backend(budget=budget, inner=inner)
    compiled = torch.compile(model, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ckpt_pass.BudgetExceededWarning)
        for rows in (WHOLE, LAST, WHOLE, 9):
            peak_of(model, compiled, rows)
        first, second = backend.plans
        assert first.budget_bytes is not None and first.budget_bytes == second.budget_bytes
        assert [size.traced for size in second.dimensions] == [WHOLE]
        assert peak_of(model, compiled, WHOLE) == second.peak_bytes <= first.budget_bytes
    x, weights = batch(LAST)
    expected = torch.autograd.grad(model(x, weights), list(model.parameters()))
    found = torch.autograd.grad(compiled(x, weights), list(model.parameters()))
    torch.testing.assert_close(found, expected)


def test_sizes_that_another_graph_is_for_do_not_count() -> None:
    torch._dynamo.reset()
    backend = ckpt_pass.make_backend(budget="1MiB", inner="aot_eager")
    compiled = torch.compile(Net(limit=100), backend=backend)
    for rows in (WHOLE, LAST, 9):
        compiled(*batch(rows)).backward()
    assert [size.traced for plan in backend.plans for size in plan.dimensions] == [LAST]


def test_a_fraction_that_a_smaller_graph_cannot_have() -> None:
    """Its gradients are as large as the whole batch's."""
    torch._dynamo.reset()
    model = Net()
    backend = ckpt_pass.make_backend(budget=0.6, inner="aot_eager")
    compiled = torch.compile(model, backend=backend, dynamic=False)
    compiled(*batch(WHOLE)).backward()
    with pytest.warns(ckpt_pass.UncoveredBudgetWarning, match="another shape") as said:
        for rows in (LAST, 9):
            compiled(*batch(rows)).backward()
    assert len([w for w in said if w.category is ckpt_pass.UncoveredBudgetWarning]) == 1
    model.zero_grad()
    assert peak_of(model, compiled, 9) == backend.plans[-1].peak_bytes


def test_a_fraction_that_the_first_graph_cannot_have_is_refused() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        Net(), backend=ckpt_pass.make_backend(budget=0.3, inner="aot_eager"), dynamic=False
    )
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="No plan fits"):
        compiled(*batch(9))
