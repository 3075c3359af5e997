"""Several microbatches in flight, as in a pipeline: what each holds is in the peak."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import record_function

import ckpt_pass
from ckpt_pass._torch.collector import quiet_collector
from ckpt_pass.measure.allocations import profiled, read_recording

ROWS, WIDTH, MICROBATCHES = 128, 32, 5
_SPAN = "microbatches"


class Layer(nn.Module):
    """Ends in what its backward needs of its own: a region of it keeps a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.drop(self.down(self.up(x).tanh()))
        return found


def measured(stage: nn.Module, inputs: list[Tensor], in_flight: int) -> int:
    """The peak of a stage that has so many microbatches between forward and backward."""

    def step() -> None:
        waiting: list[Tensor] = []
        for x in inputs:
            waiting.append(stage(x))
            if len(waiting) == in_flight:
                waiting.pop(0).backward(torch.ones(ROWS, WIDTH))
        while waiting:
            waiting.pop(0).backward(torch.ones(ROWS, WIDTH))
        stage.zero_grad()

    step()
    with quiet_collector(), profiled() as session, record_function(_SPAN):
        step()
    peaks = read_recording(session, torch.device("cpu"), lambda name: name == _SPAN).peaks()
    return peaks[_SPAN]


@pytest.mark.parametrize(("in_flight", "budget"), [(1, 0.95), (2, 0.8), (4, 0.8)])
def test_a_stage_that_ends_in_a_region(in_flight: int, budget: float) -> None:
    """Its last region runs again before any other op of the backward, and held till then."""
    torch.manual_seed(0)
    stage = nn.Sequential(Layer(), Layer())
    inputs = [torch.randn(ROWS, WIDTH) for _ in range(MICROBATCHES)]
    plan = ckpt_pass.plan(stage, inputs[0], budget=budget, mode="eager", in_flight=in_flight)
    plan.apply(stage)
    assert plan.budget_bytes is not None
    assert measured(stage, inputs, in_flight) == plan.predicted.peak_bytes <= plan.budget_bytes
