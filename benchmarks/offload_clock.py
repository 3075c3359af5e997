"""Steps that move values over a link of a known rate: the clock's seconds, and measured ones.

A store is slowed down to a rate, so that the link is known; kernels are timed one by one
(``cost="measured"``). Each plan runs compiled around aot_eager on one thread, in turn with the step
that moves and recomputes nothing, whose seconds tell what the sum of its kernels' leaves out
(interpreting the graph, autograd): the clock is held against the step without that share.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

import ckpt_pass
from benchmarks.common import Bar, ClockRow, Result, fresh_kernels, torch_threads
from ckpt_pass.offloading.stores import host_store
from tests.zoo import Built, hf, loss_of

ROUNDS = 11
#: Rates, as shares of what carries all that the step saves during its forward.
RATES = (0.5, 1.0, 2.0)
#: Budgets, from the least with moves alone (0) to the peak with nothing recomputed (1).
PARTS = (0.1, 0.3, 0.5, 0.7)
CLOSE = 0.1


def run(
    make: Callable[[], Built] = hf.gpt2_12l,
    rates: Sequence[float] = RATES,
    parts: Sequence[float] = PARTS,
    rounds: int = ROUNDS,
) -> Result:
    """Time plans for every rate and budget.

    Args:
        make: makes the model and its inputs.
        rates: of the link, as shares of what carries all saved bytes during the forward.
        parts: budgets, from the least to the peak with nothing recomputed.
        rounds: timings of each step.
    """
    with torch_threads(1), fresh_kernels():
        rows = tuple(_rows(*make(), rates, parts, rounds))
    off = [abs(row.measured_s / row.simulated_s - 1) for row in rows]
    bytes_off = [abs(row.measured_bytes - row.predicted_bytes) for row in rows]
    bars = (
        Bar("measured step time beside the clock's, worst", max(off), CLOSE),
        Bar("measured peak away from the prediction, worst", max(bytes_off), 0, "bytes"),
    )
    return Result("offload", "offload: plans on links of known rates (aot_eager, CPU)", rows, bars)


def _rows(
    module: nn.Module,
    inputs: tuple[Any, ...],
    rates: Sequence[float],
    parts: Sequence[float],
    rounds: int,
) -> Iterator[ClockRow]:
    plain = ckpt_pass.plan(module, *inputs, budget=1.0, cost="measured")
    timeline = plain.predicted.timeline
    base = compiled(module, plan=plain)
    step_s, top = timeline.duration_s, plain.peak_bytes
    for rate in rates:
        bytes_per_s = rate * float(plain.saved_bytes) / timeline.backward_at_s
        store = host_store(bytes_per_s=bytes_per_s)
        least = least_peak(module, inputs, store)
        for part in parts:
            budget = least + int(part * (top - least))
            plan = ckpt_pass.plan(module, *inputs, budget=budget, cost="measured", offload=store)
            found = plan.predicted.offloaded
            assert found is not None
            step = compiled(module, plan=plan, offload=store)
            measured = ckpt_pass.measure_step(
                lambda step=step: loss_of(step(*inputs)), repeats=1, params=module.parameters()
            )
            ours, without = times_in_turn((step, base), inputs, module, rounds)
            yield ClockRow(
                rate=bytes_per_s,
                budget_bytes=budget,
                moved_bytes=found.moved_bytes,
                recompute_s=plan.predicted.recompute_time_s,
                stall_s=found.stall_s,
                simulated_s=found.step_time_s + without - step_s,
                measured_s=ours,
                predicted_bytes=plan.peak_bytes,
                measured_bytes=measured.peak_bytes,
            )


def compiled(module: nn.Module, **options: Any) -> Callable[..., Any]:
    """The module compiled around aot_eager by a backend of these options."""
    torch._dynamo.reset()
    backend = ckpt_pass.make_backend(inner="aot_eager", **options)
    return torch.compile(module, backend=backend, fullgraph=True)


def least_peak(module: nn.Module, inputs: tuple[Any, ...], store: Any = None) -> int:
    """The least peak that a plan with these costs can have."""
    try:
        ckpt_pass.plan(module, *inputs, budget=1, cost="measured", offload=store)
    except ckpt_pass.InfeasibleBudgetError as error:
        return error.least_feasible_bytes
    raise AssertionError("a budget of one byte was met")


def times_in_turn(
    steps: Sequence[Callable[..., Any]], inputs: tuple[Any, ...], module: nn.Module, rounds: int
) -> list[float]:
    """Median seconds of each step, in turn; the first round warms up."""
    found: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds + 1):
        for step, times in zip(steps, found, strict=True):
            module.zero_grad(set_to_none=True)
            began = time.perf_counter()
            loss_of(step(*inputs)).backward()
            times.append(time.perf_counter() - began)
    return [statistics.median(times[1:]) for times in found]
