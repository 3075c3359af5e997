"""Functional writing into views: the result lies in a copy of all memory behind them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass
from ckpt_pass.graph.capture import capture
from ckpt_pass.graph.kernels import Kernels
from tests.zoo import assert_same_step, run_step

WIDTH = 32


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH)

    def rows(self, x: Tensor) -> Tensor:
        return x @ self.weight


class IntoRows(Writes):
    """In place, which a graph does by copies: rows of a matrix of a stack of such."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.rows(x)
        stack = torch.zeros(12, 8, WIDTH)
        stack[3][2:6] = rows[2:6]
        return (stack[3] * rows).sin().sum()


class ByName(Writes):
    """By the functions that say so, one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.rows(x)
        found = rows.exp().expand(12, 8, WIDTH).contiguous()[3]
        found = torch.select_scatter(found, rows[0], 0, 2)
        found = torch.slice_scatter(found, rows[:4], 0, 2, 6)
        found = torch.diagonal_scatter(found, rows[0, :8])
        return found.sin().sum()


class BehindALoss(Writes):
    """Into a scalar that lies in the memory of all terms."""

    def forward(self, x: Tensor) -> Tensor:
        loss = torch.nn.functional.mse_loss(self.rows(x), x)
        losses = torch.slice_scatter(loss.view(1), loss.exp().view(1), 0, 0, 1)
        return losses.sin().sum()


@pytest.mark.parametrize("build", [IntoRows, ByName, BehindALoss])
def test_predicted_is_measured(build: type[Writes]) -> None:
    model, x = build(), torch.randn(8, WIDTH)
    plain = run_step(model, (x,))
    backend = ckpt_pass.make_backend(budget="1GiB", inner="aot_eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_same_step(run_step(model, (x,), compiled), plain)
    measured = ckpt_pass.measure_step(lambda: compiled(x), repeats=1)
    assert measured.peak_bytes == backend.plans[0].peak_bytes

    plan = ckpt_pass.plan(model, x, budget="1GiB", mode="eager")
    eager = ckpt_pass.measure_step(lambda: model(x), repeats=1)
    assert eager.peak_bytes <= plan.peak_bytes <= eager.peak_bytes + 64


def test_the_memory_behind_is_a_part_of_the_call() -> None:
    with capture(IntoRows(), torch.randn(8, WIDTH)) as joint:
        calls = [node for node in joint.nodes if node.op == "call_function"]
        facts = Kernels().facts(calls)
        written = {
            node.target: facts[node].outputs
            for node in calls
            if node.target is torch.ops.aten.slice_scatter.default
        }
    (outputs,) = written.values()
    assert outputs is not None
    assert outputs[0].size == (8, WIDTH)
    assert outputs[0].storage_bytes == 12 * 8 * WIDTH * 4
