"""Joint plans beside each decision alone and beside fixed rules, measured on a link of one rate.

The budgets and the ways are those of :mod:`benchmarks.offload_plans`, whose tables are by the clock
alone. Here a store is slowed down to a rate, kernels are timed one by one (``cost="measured"``),
and each plan runs compiled around aot_eager on one thread, all ways of a budget in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

from torch import nn

import ckpt_pass
from benchmarks.common import Bar, Result, WayRow, fresh_kernels, torch_threads
from benchmarks.offload_clock import compiled, least_peak, times_in_turn
from benchmarks.offload_plans import PARTS
from ckpt_pass.offloading.store import Store
from ckpt_pass.offloading.stores import host_store
from ckpt_pass.planner.ground import Ground, Mask
from ckpt_pass.planner.link import Link
from ckpt_pass.planner.offload_rules import choices, largest_first, layers_but_the_last
from ckpt_pass.planner.problem import Problem
from ckpt_pass.planner.solution import InfeasibleBudgetError, Solution, without_recompute
from tests.zoo import Built, hf

ROUNDS = 5
#: Of the rate that carries all that the step saves during its forward.
RATE = 0.3
JOINT, ALONE = "joint", "recompute only"
#: As for other times: what differs by less is as long.
AS_LONG = 1.02

#: The sets that a rule would move, of a plan that recomputes nothing.
Rule = Callable[[Ground, int], Iterator[Mask]]


def _one(rule: Callable[[Ground, int], Mask | None]) -> Rule:
    """A rule that names one set, if any."""
    return lambda ground, budget_bytes: (
        mask for mask in (rule(ground, budget_bytes),) if mask is not None
    )


RULES: dict[str, Rule] = {
    "offload only": choices,
    "largest first": _one(largest_first),
    "all layers but the last": _one(layers_but_the_last),
}


def by_rule(
    rule: Rule,
    problem: Problem,
    budget_bytes: int,
    borders: Collection[int] = (),
    time_limit_s: float | None = None,
    link: Link | None = None,
) -> Solution:
    """A solver that recomputes nothing and moves the set of a rule that is fastest by the clock.

    Raises:
        InfeasibleBudgetError: no set of the rule makes the step fit.
    """
    assert link is not None
    ground = Ground(problem, without_recompute(problem), link)
    masks = list(rule(ground, budget_bytes))
    if not masks:
        raise InfeasibleBudgetError(budget_bytes, ground.least_bytes)
    best = min(masks, key=lambda mask: ground.step_time_s(mask, budget_bytes))
    return ground.solution(best, budget_bytes, "rule")


def run(
    make: Callable[[], Built] = hf.gpt2_12l,
    rate: float = RATE,
    parts: Sequence[float] = PARTS,
    rounds: int = ROUNDS,
) -> Result:
    """Time every way at every budget.

    Args:
        make: makes the model and its inputs.
        rate: of the link, as a share of what carries all saved bytes during the forward.
        parts: budgets, from the least without moves to the peak with nothing recomputed.
        rounds: timings of each step.
    """
    with torch_threads(1), fresh_kernels():
        rows = tuple(_rows(*make(), rate, parts, rounds))
    ours = {row.budget_bytes: row.measured_s for row in rows if row.way == JOINT}
    slower = [ours[row.budget_bytes] / row.measured_s for row in rows if row.way != JOINT]
    over = [row.measured_bytes - row.budget_bytes for row in rows]
    bars = (
        Bar("step time of joint plans, by any other way's, worst", max(slower), AS_LONG),
        Bar("measured peak over the budget, worst", max(0, *over), 0, "bytes"),
    )
    return Result("offload-ways", "offload: joint plans beside others, on one link", rows, bars)


def _rows(
    module: nn.Module, inputs: tuple[Any, ...], rate: float, parts: Sequence[float], rounds: int
) -> Iterator[WayRow]:
    plain = ckpt_pass.plan(module, *inputs, budget=1.0, cost="measured")
    bytes_per_s = rate * float(plain.saved_bytes) / plain.predicted.timeline.backward_at_s
    store = host_store(bytes_per_s=bytes_per_s)
    least = least_peak(module, inputs)
    for part in parts:
        budget = least + int(part * (plain.peak_bytes - least))
        plans = dict(_plans(module, inputs, budget, store))
        steps = [
            compiled(module, plan=plan, offload=None if way == ALONE else store)
            for way, plan in plans.items()
        ]
        peaks = [
            ckpt_pass.measure_step(lambda step=step: step(*inputs), repeats=1).peak_bytes
            for step in steps
        ]
        measured = times_in_turn(steps, inputs, module, rounds)
        for (way, plan), seconds, peak in zip(plans.items(), measured, peaks, strict=True):
            moved = plan.predicted.offloaded
            yield WayRow(
                way=way,
                rate=bytes_per_s,
                budget_bytes=budget,
                moved_bytes=0 if moved is None else moved.moved_bytes,
                recompute_s=plan.predicted.recompute_time_s,
                stall_s=0.0 if moved is None else moved.stall_s,
                measured_s=seconds,
                measured_bytes=peak,
            )


def _plans(
    module: nn.Module, inputs: tuple[Any, ...], budget: int, store: Store
) -> Iterator[tuple[str, ckpt_pass.Plan]]:
    """The plans of the ways that fit."""
    how: dict[str, Any] = {"budget": budget, "cost": "measured"}
    yield JOINT, ckpt_pass.plan(module, *inputs, **how, offload=store)
    yield ALONE, ckpt_pass.plan(module, *inputs, **how)
    for name, rule in RULES.items():
        solver = partial(by_rule, rule)
        try:
            yield name, ckpt_pass.plan(module, *inputs, **how, offload=store, solver=solver)
        except InfeasibleBudgetError:
            continue
