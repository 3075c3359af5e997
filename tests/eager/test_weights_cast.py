"""Eager plans under autocast: regions cast weights again, whatever was cached in the forward."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckpt_pass
from tests.job.jobs import peak_above

WIDTH, ROWS = 32, 64
X = torch.randn(ROWS, WIDTH)


class Block(nn.Module):
    def __init__(self, up: nn.Linear | None = None) -> None:
        super().__init__()
        self.norm, self.down = nn.LayerNorm(WIDTH), nn.Linear(8 * WIDTH, WIDTH)
        self.up = up if up is not None else nn.Linear(WIDTH, 8 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return found


class Tied(nn.Module):
    """Blocks that share a layer, whose weight the first of them casts for all."""

    cache = True

    def __init__(self) -> None:
        super().__init__()
        first = Block()
        self.blocks = nn.ModuleList([first, Block(first.up), Block(first.up)])

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=self.cache):
            for block in self.blocks:
                x = block(x)
            return x.square().mean()


class Uncached(Tied):
    cache = False


class Again(nn.Module):
    """One block, four times: the first casts its weights for all."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for _ in range(4):
                x = self.block(x)
            return x.square().mean()


class Inside(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x).float()


def inside() -> nn.Module:
    """Blocks with an autocast of their own."""

    class Loss(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.square().mean()

    return nn.Sequential(Inside(), Inside(), Inside(), Loss())


@pytest.mark.parametrize("make", [Tied, Uncached, Again, inside])
@pytest.mark.parametrize("way", [0.0, 0.3, 0.6])
def test_peaks_under_autocast(make: type[nn.Module], way: float) -> None:
    """As predicted but for autograd's numbers, and within the budget, with equal gradients."""
    torch.manual_seed(0)
    model = make()
    with pytest.raises(ckpt_pass.InfeasibleBudgetError) as told:
        ckpt_pass.plan(model, X, budget=100, mode="eager")
    least = told.value.least_feasible_bytes
    plain = ckpt_pass.plan(model, X, budget=1.0, mode="eager").peak_bytes
    assert least < 0.8 * plain
    plan = ckpt_pass.plan(model, X, budget=int(least + way * (plain - least)), mode="eager")
    model(X).backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    with plan.applied(model) if plan.regions else contextlib.nullcontext():
        measured = peak_above(lambda: model(X).backward())
    # 128 where a layer runs again and again on a processor with AVX2 at most; 64 elsewhere.
    assert 0 <= plan.peak_bytes - measured <= 128
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))
