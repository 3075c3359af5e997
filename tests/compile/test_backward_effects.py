"""What a backward does besides gradients: mutations, hooks, assertions; and sparse gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckpt_pass

WAYS: list[dict[str, Any]] = [
    {"policy": "save-matmul"},
    {"policy": "save-nothing"},
    {"budget": 0.8},
]


class Meter(torch.autograd.Function):
    """Counts in one buffer how often a backward ran, and keeps in another its largest gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, runs: Tensor, largest: Tensor) -> Tensor:
        ctx.save_for_backward(runs, largest)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        runs, largest = ctx.saved_tensors
        with torch.no_grad():
            runs.add_(1)
            largest.copy_(torch.maximum(largest, gradient.abs().max() * runs))
        return gradient * 2, None, None


class Metered(nn.Module):
    runs: Tensor
    largest: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 64), nn.Linear(64, 16)
        self.register_buffer("runs", torch.zeros(()))
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        hidden = Meter.apply(self.first(x).tanh(), self.runs, self.largest)
        return self.second(hidden).square().mean()


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_what_a_backward_writes_into_buffers_is_written(way: dict[str, Any]) -> None:
    seen = []
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Metered()
        backend = ckpt_pass.make_backend(**way, inner="aot_eager")
        step = torch.compile(model, backend=backend, fullgraph=True) if compiled else model
        for _ in range(3):
            step(x).backward()
        seen.append([*model.buffers(), *(p.grad for p in model.parameters())])
    assert seen[0][0].item() == 3
    for plain, ours in zip(*seen, strict=True):
        assert plain is not None and ours is not None and torch.equal(plain, ours)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_sparse_gradients(way: dict[str, Any]) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(50, 16, sparse=True), nn.Linear(16, 16)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids)).tanh().square().mean()

    torch.manual_seed(0)
    model, ids = Words(), torch.randint(0, 50, (8, 12))
    model(ids).backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    backend = ckpt_pass.make_backend(**way, inner="aot_eager")
    torch.compile(model, backend=backend, fullgraph=True)(ids).backward()
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None and wanted is not None
        assert parameter.grad.layout is wanted.layout
        assert torch.equal(parameter.grad.to_dense(), wanted.to_dense())


def test_assertions_of_the_forward_hold_nothing_in_the_backward() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gates = nn.ModuleList(nn.Linear(16, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for gate in self.gates:
                weight, chosen = gate(x).softmax(-1).max(-1)
                x = x + (F.one_hot(chosen, 4).to(x.dtype) * weight[:, None]).repeat(1, 4).tanh()
            return x.square().mean()

    model, x = Experts(), torch.randn(64, 16)
    with pytest.raises(ckpt_pass.InfeasibleBudgetError) as caught:
        ckpt_pass.plan(model, x, budget=16)
    backend = ckpt_pass.make_backend(budget=caught.value.least_feasible_bytes, inner="aot_eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    measured = ckpt_pass.measure_step(lambda: compiled(x), warmup=1, repeats=1)
    assert measured.peak_bytes == backend.plans[0].peak_bytes == backend.plans[0].budget_bytes
