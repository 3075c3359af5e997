"""Embeddings with sparse gradients, compiled: right, and as large as they are said to be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass

ROWS, WIDTH = 1024, 32


class Bags(nn.Module):
    def __init__(self, count: int, **how: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bags = nn.ModuleList(nn.EmbeddingBag(300, WIDTH, **how) for _ in range(count))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, indices: Tensor, offsets: Tensor) -> Tensor:
        found = torch.ones(())
        for bags in self.bags:
            found = found * bags(indices, offsets)
        return self.head(found.tanh()).square().mean()


class Normed(nn.Module):
    """Its rows are made shorter in the forward, in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(300, WIDTH, sparse=True, max_norm=1.0)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, indices: Tensor) -> Tensor:
        return self.head(self.table(indices).tanh()).square().mean()


def indices_of(dtype: torch.dtype = torch.int64) -> Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 300, (ROWS,), dtype=dtype)


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("way", ["compiled", "eager"])
def test_bags(way: Any, dtype: torch.dtype, mode: str, sparse: bool) -> None:
    given = indices_of(dtype), torch.arange(0, ROWS, 4, dtype=dtype)
    torch._dynamo.reset()
    verified = ckpt_pass.verify(Bags(2, mode=mode, sparse=sparse), *given, budget="1MiB", mode=way)
    assert verified.ok, verified


@pytest.mark.parametrize("way", ["compiled", "eager"])
def test_bags_that_leave_padding_out(way: Any) -> None:
    """How many rows that is, their values tell: all of them are counted."""
    indices, offsets = indices_of().clamp(min=1), torch.arange(0, ROWS, 4)
    torch._dynamo.reset()
    model = Bags(2, mode="sum", sparse=True, padding_idx=0)
    verified = ckpt_pass.verify(model, indices, offsets, budget="1MiB", mode=way)
    assert verified.ok, verified
    indices[::8] = 0
    torch._dynamo.reset()
    model.zero_grad(set_to_none=True)
    plan = ckpt_pass.plan(model, indices, offsets, budget="1MiB", mode=way)
    if way == "eager":
        plan.apply(model)
    else:
        model.compile(backend=ckpt_pass.make_backend(plan=plan))
    leaves = list(model.parameters())
    step = ckpt_pass.measure_step(lambda: model(indices, offsets), params=leaves, repeats=1)
    assert 0.8 * plan.peak_bytes <= step.peak_bytes < plan.peak_bytes


@pytest.mark.parametrize("budget", [None, "1MiB"])
def test_rows_that_are_renormed_in_place(budget: str | None) -> None:
    torch._dynamo.reset()
    model, indices = Normed(), indices_of()
    expected = torch.compile(Normed(), backend="aot_eager")
    expected(indices).backward()
    backend = ckpt_pass.make_backend(budget=budget, inner="aot_eager")
    torch.compile(model, backend=backend)(indices).backward()
    torch.testing.assert_close(
        model.table.weight.grad.to_dense(), expected.table.weight.grad.to_dense(), rtol=0, atol=0
    )
