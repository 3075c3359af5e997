"""What a model's code keeps in other files is what it was, after planning: nothing fake."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass
from tests.state import tables
from tests.state.tables import WAYS

ROWS = 32


class Layer(nn.Module):
    def __init__(self, table: Callable[[int], Tensor], cut: bool) -> None:
        super().__init__()
        self.fc, self.table, self.cut = nn.Linear(8, 8), table, cut

    def forward(self, x: Tensor) -> Tensor:
        if self.cut:
            torch._dynamo.graph_break()
        return x + torch.tanh(self.fc(x * self.table(len(x))))


def net(table: Callable[[int], Tensor], cut: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(table, cut) for _ in range(3)))


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def loss(output: Tensor) -> Tensor:
    return output.square().mean()


def planned(model: nn.Module, x: Tensor, mode: str) -> None:
    if mode == "eager":
        ckpt_pass.plan(model, x, budget=1.0, mode="eager", loss_fn=loss)
    else:
        ckpt_pass.plan(model, x, budget=1.0, loss_fn=loss)


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(ROWS, 8)


@pytest.mark.parametrize("table", WAYS, ids=lambda way: getattr(way, "__name__", "remembered"))
def test_a_table_that_is_made_at_first_use_is_made_again(
    table: Callable[[int], Tensor], x: Tensor
) -> None:
    expected = gradients(net(lambda rows: tables.made(rows)), x)
    model = net(table)
    planned(model, x, "eager")
    found = gradients(model, x)
    assert all(type(gradient) is Tensor for gradient in found)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("table", [tables.in_a_dict, tables.remembered, tables.in_a_global])
def test_a_table_that_is_there_stays(table: Callable[[int], Tensor], x: Tensor) -> None:
    there = table(ROWS)
    planned(net(table), x, "eager")
    assert table(ROWS) is there


@pytest.mark.parametrize("table", [tables.in_a_dict, tables.of_an_object])
def test_what_runs_between_two_graphs_leaves_nothing_fake(
    table: Callable[[int], Tensor], x: Tensor
) -> None:
    tables._BY_ROWS.clear()
    tables._SHELF.own = None
    expected = gradients(net(lambda rows: tables.made(rows)), x)
    model = net(table, cut=True)
    planned(model, x, "compiled")
    assert all(map(torch.equal, gradients(model, x), expected))


def test_torch_compile_leaves_no_mark_on_a_module_that_is_planned(x: Tensor) -> None:
    class Looks(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum().item() < 1e9 else x

    model = nn.Sequential(*(Looks(tables.made, False) for _ in range(2)))
    before = set(vars(model))
    planned(model, x, "compiled")
    assert set(vars(model)) == before
