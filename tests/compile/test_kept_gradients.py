"""Gradients that leaves cannot keep as they are: what autograd copies is in the plan's peak."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckpt_pass
from tests.zoo import assert_same_step, run_step

WIDTH = 48


class Weighted(nn.Module):
    """A loss of a few values and two weights, so that gradients are what a step holds."""

    def __init__(self, loss: Callable[[Weighted, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH)
        self.other = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH)
        self.cube = nn.Parameter(torch.randn(4, WIDTH, WIDTH).permute(1, 2, 0))
        self.one = nn.Parameter(torch.randn(1, WIDTH))
        self.loss = loss

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(self, x)


def _side_by_side(self: Weighted, x: Tensor) -> Tensor:
    both = torch.cat([self.weight, self.other], 1)
    return F.linear(torch.cat([x, x], 1), both).sin().sum()


LOSSES: dict[str, Callable[[Weighted, Tensor], Tensor]] = {
    "transposed": lambda self, x: torch.einsum("bi,io->ob", x, self.weight).sin().sum(),
    "expanded": lambda self, x: self.weight.sum() + (x @ self.other).sum(),
    "views of one": _side_by_side,
    "one for two": lambda self, x: (self.weight + self.other).sum() * 2 + (self.one * x).sum(),
    "one twice": lambda self, x: ((self.weight + self.other).sin() @ x.T).sum(),
    "permuted leaf": lambda self, x: (self.cube * 2).sum() + (x @ self.cube[..., 0]).sum(),
    "rows of one": lambda self, x: self.one.sum() + (self.one * x).sin().sum(),
    "kept": lambda self, x: (x @ self.weight).sin().sum(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_copies_for_leaves_are_predicted(name: str) -> None:
    model, x = Weighted(LOSSES[name]), torch.randn(2, WIDTH)
    plain = run_step(model, (x,))
    backend = ckpt_pass.make_backend(budget="1GiB", inner="aot_eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_same_step(run_step(model, (x,), compiled), plain)
    measured = ckpt_pass.measure_step(
        lambda: compiled(x), repeats=1, params=list(model.parameters())
    )
    (plan,) = backend.plans
    assert measured.peak_bytes == plan.peak_bytes
    ahead = ckpt_pass.plan(model, x, budget="1GiB")
    assert ahead.peak_bytes == plan.peak_bytes
    torch._dynamo.reset()
    again = torch.compile(model, backend=ckpt_pass.make_backend(plan=ahead, inner="aot_eager"))
    again(x).backward()  # the graph that was planned is the one that runs


def test_the_gradient_of_an_input_counts_where_it_is_a_leaf() -> None:
    model = Weighted(lambda self, x: x.sum() + torch.einsum("bi,io->ob", x[:2], self.weight).sum())
    x = torch.randn(64, WIDTH, requires_grad=True)
    backend = ckpt_pass.make_backend(budget="1GiB", inner="aot_eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    measured = ckpt_pass.measure_step(
        lambda: compiled(x), warmup=1, repeats=1, params=[x, *model.parameters()]
    )
    assert measured.peak_bytes == backend.plans[0].peak_bytes


def test_steps_of_several_graphs_copy_once() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Weighted(LOSSES["transposed"])
            self.second = Weighted(LOSSES["views of one"])

        def forward(self, x: Tensor) -> Tensor:
            loss = self.first(x)
            torch._dynamo.graph_break()
            return loss + self.second(x * loss)

    model, x = Cut(), torch.randn(2, WIDTH)
    plan = ckpt_pass.plan(model, x, budget="1GiB")
    backend = ckpt_pass.make_backend(plan=plan, inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    measured = ckpt_pass.measure_step(
        lambda: compiled(x), warmup=1, repeats=1, params=list(model.parameters())
    )
    assert measured.peak_bytes == plan.peak_bytes
