"""Masks made of floating constants: a recording goes the way of the real step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckpt_pass
from tests.zoo import assert_same_step, run_step

ROWS, WIDTH = 24, 32


class Skips(nn.Module):
    """Layers with scores of their own where a mask masks something.

    Attributes:
        careful: as libraries are: it does not ask a tensor that it takes for a tracer's.
    """

    careful = True

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def mask(self, x: Tensor, given: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        mask = self.mask(x, given)
        nothing = (not self.careful or type(mask) is Tensor) and bool(mask.all())
        for layer in self.layers:
            h = layer(x)
            if not nothing:
                scores = (h @ h.mT).masked_fill(~mask, -1e9).softmax(-1)
                h = scores @ h
            x = x + F.gelu(h)
        return x.square().mean()


class OfOnes(Skips):
    def mask(self, x: Tensor, given: Tensor) -> Tensor:
        return torch.ones(x.shape[:1]).to(torch.bool)


class OfArithmetic(Skips):
    def mask(self, x: Tensor, given: Tensor) -> Tensor:
        far = torch.full((ROWS, ROWS), float("-inf")).triu(1)
        rising = torch.linspace(0, 1, ROWS)[:, None] >= torch.linspace(0, 1, ROWS)
        return (far == 0) | ~rising


class OfLooks(Skips):
    def mask(self, x: Tensor, given: Tensor) -> Tensor:
        return x.new_zeros(ROWS).add_(1) * torch.ones_like(x[:, 0]) > 0.5


class OfAnArgument(Skips):
    def mask(self, x: Tensor, given: Tensor) -> Tensor:
        return given.clone().mul_(2) > 1


class OfABuffer(Skips):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.ones(ROWS))

    def mask(self, x: Tensor, given: Tensor) -> Tensor:
        return self.kept.bool()


class OfWhatWasWrittenInto(Skips):
    """A constant that holds values of the model's, by a view."""

    careful = False

    def mask(self, x: Tensor, given: Tensor) -> Tensor:
        kept = torch.zeros(ROWS, WIDTH)
        kept[:].copy_(self.layers[0](x).detach())
        return (kept.sum(-1) > -1e9).logical_and(kept.view(-1)[: ROWS * WIDTH].isfinite().all())


class OfDraws(Skips):
    careful = False

    def mask(self, x: Tensor, given: Tensor) -> Tensor:
        return torch.zeros(ROWS).uniform_() >= torch.rand(ROWS) - 1


BUILDS = [OfOnes, OfArithmetic, OfLooks, OfAnArgument, OfABuffer, OfWhatWasWrittenInto, OfDraws]


@pytest.mark.parametrize(
    ("build", "left"), [*((build, ROWS) for build in BUILDS), (OfAnArgument, 3), (OfABuffer, 3)]
)
def test_the_recording_goes_the_way_of_the_step(build: type[Skips], left: int) -> None:
    model, x, given = build(), torch.randn(ROWS, WIDTH), torch.ones(ROWS)
    for mask in (given, *model.buffers()):
        mask[left:] = 0
    plain = run_step(model, (x, given))
    peak = ckpt_pass.measure_step(lambda: model(x, given), repeats=1).peak_bytes
    try:
        plan = ckpt_pass.plan(model, x, given, budget=0.6, mode="eager")
    except ckpt_pass.InfeasibleBudgetError as error:
        budget = error.least_feasible_bytes
        plan = ckpt_pass.plan(model, x, given, budget=budget, mode="eager")
    assert abs(plan.predicted.plain_timeline.peak_bytes - peak) <= 64
    plan.apply(model)
    assert_same_step(run_step(model, (x, given)), plain)
    measured = ckpt_pass.measure_step(lambda: model(x, given), repeats=1).peak_bytes
    assert measured <= plan.budget_bytes
    assert abs(plan.peak_bytes - measured) <= 64
    assert given.sum() == left  # what was computed beside is a copy
