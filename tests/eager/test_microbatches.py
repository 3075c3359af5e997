"""Steps that are one of several: gradients that are there, and microbatches in flight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass
import ckpt_pass.distributed
from ckpt_pass._torch.collector import quiet_collector
from ckpt_pass.measure.allocations import profiled, read_recording

ROWS, WIDTH = 48, 32
#: Bytes that autograd keeps of Python's numbers are counted a little longer than it does.
SCALARS = 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = x + self.down(torch.tanh(self.up(self.norm(x))))
        return hidden


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Block() for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(x).square().mean()
        return found


def made() -> tuple[Blocks, Tensor]:
    torch.manual_seed(0)
    return Blocks(), torch.randn(ROWS, WIDTH)


def peak(step: Callable[[], object]) -> int:
    with quiet_collector(), profiled() as session, torch.profiler.record_function("a step"):
        step()
    recording = read_recording(session, torch.device("cpu"), lambda name: name == "a step")
    return recording.peaks()["a step"]


def planned(budget: float, **asked: Any) -> tuple[ckpt_pass.Plan, Blocks, Tensor]:
    model, x = made()
    plan = ckpt_pass.plan(model, x, budget=budget, mode="eager", **asked)
    assert isinstance(plan, ckpt_pass.Plan)
    plan.apply(model)
    model(x).backward()  # once, for what is made on first use
    model.zero_grad()
    return plan, model, x


@pytest.mark.parametrize("budget", [1.0, 0.7])
def test_gradients_that_are_there(budget: float) -> None:
    plan, model, x = planned(budget, gradients="kept")
    model(x).backward()
    model.zero_grad(set_to_none=False)
    assert peak(lambda: model(x).backward()) == plan.peak_bytes


@pytest.mark.parametrize("budget", [1.0, 0.8])
def test_gradients_that_add_up(budget: float) -> None:
    plan, model, x = planned(budget, gradients="accumulated")

    def step() -> None:
        for _ in range(3):
            model(x).backward()

    assert peak(step) == plan.peak_bytes
    plain = ckpt_pass.plan(made()[0], x, budget=1.0, mode="eager")
    assert isinstance(plain, ckpt_pass.Plan)
    assert plan.predicted.plain_timeline is not None
    assert plan.predicted.plain_timeline.peak_bytes > plain.peak_bytes


def run_in_flight(model: nn.Module, x: Tensor, count: int, microbatches: int) -> None:
    """Forwards up to a number in flight, then one backward and one forward in turn (1F1B)."""
    losses = [model(x) for _ in range(count)]
    for _ in range(microbatches - count):
        losses.pop(0).backward()
        losses.append(model(x))
    for loss in losses[::-1]:
        loss.backward()


@pytest.mark.parametrize("count", [2, 4])
def test_microbatches_in_flight(count: int) -> None:
    plan, model, x = planned(0.6, in_flight=count)
    measured = peak(lambda: run_in_flight(model, x, count, count + 2))
    assert 0.99 * plan.peak_bytes <= measured <= plan.peak_bytes
    one, _, _ = planned(1.0, gradients="accumulated")
    assert plan.budget_bytes is not None and plan.predicted.plain_timeline is not None
    assert plan.predicted.plain_timeline.peak_bytes > one.peak_bytes


def test_a_file_says_it() -> None:
    many = ckpt_pass.distributed.InFlight(4, 3)
    plan, _, _ = planned(0.8, in_flight=many)
    again = ckpt_pass.Plan.from_json(plan.to_json())
    assert again.asked.goal == plan.asked.goal and again == plan
    assert "4 microbatches in flight, 3 once there are gradients" in str(again.asked.goal)


def test_a_hook_before_the_forward_is_no_part_of_a_region() -> None:
    """What it makes is made once, and held as an argument."""
    model, x = made()

    def twice(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0] * 2,)

    for layer in model.layers:
        layer.register_forward_pre_hook(twice)  # type: ignore[arg-type]
    plan = ckpt_pass.plan(model, x, budget=0.95, mode="eager")
    assert isinstance(plan, ckpt_pass.Plan) and plan.regions
    plan.apply(model)
    model(x).backward()
    model.zero_grad()
    assert abs(peak(lambda: model(x).backward()) - plan.peak_bytes) <= SCALARS


def test_what_cannot_be_asked() -> None:
    model, x = made()
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"in_flight": 0}, ckpt_pass.errors.MicrobatchesError, "in_flight=0"),
        ({"gradients": "old"}, ckpt_pass.errors.MicrobatchesError, "expected one of new, kept"),
        ({"in_flight": 2, "offload": True}, ckpt_pass.errors.MicrobatchesError, "share the link"),
        ({"in_flight": 2, "budget": None}, ckpt_pass.errors.MicrobatchesError, "without a budget"),
        ({"in_flight": 2, "mode": "compiled"}, ckpt_pass.PlanModeError, "for eager plans"),
    ]
    for asked, kind, words in wrong:
        with pytest.raises(kind, match=words):
            ckpt_pass.plan(model, x, **{"mode": "eager", "budget": 0.9, **asked})
