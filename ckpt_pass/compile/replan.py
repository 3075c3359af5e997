"""The closed loop: plan again while inductor's own schedule is above the budget.

A plan is exact for the graph that inductor is given. Inductor then fuses and reorders, so that its
peak is another. Its schedule tells that peak before anything runs; where it is above the budget,
the next plan is made for as much less.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from ckpt_pass._torch import compilers
from ckpt_pass._torch.generated import GeneratedHalf
from ckpt_pass.compile.dry_run import step_peak_bytes
from ckpt_pass.compile.engine import Partitioner
from ckpt_pass.planner.solution import InfeasibleBudgetError
from ckpt_pass.plans.record import InductorPeak
from ckpt_pass.plans.value import Plan
from ckpt_pass.plans.wording import format_bytes

#: Compilations of one graph at most: each takes as long as the first.
_ROUNDS = 3


class InductorPeakWarning(UserWarning):
    """Inductor's schedule needs more than the budget, whatever plan it was given."""


@dataclass(frozen=True)
class _Round:
    """One compilation; no plan where the graph has no backward."""

    compiled: Callable[..., Any]
    plan: Plan | None
    peak_bytes: int
    halves: tuple[GeneratedHalf, ...]

    def finished(self) -> Callable[..., Any]:
        """The compiled graph with its kernels."""
        for half in self.halves:
            half.compile_kernels()
        return self.compiled


def compile_within(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    partitioner: Partitioner,
    inner_options: dict[str, Any],
    mode: str | None,
) -> tuple[Callable[..., Any], Plan | None]:
    """Compile with inductor so that its own schedule keeps to the budget.

    Returns:
        The compiled graph, and the plan that it was given; ``None`` where there is no backward.

    Raises:
        InfeasibleBudgetError: no plan fits the budget even before inductor's changes.
    """
    goal = partitioner.goal
    assert goal is not None

    def planned_for(asked_bytes: int) -> _Round:
        other = replace(partitioner, goal=replace(goal, budget=max(asked_bytes, 1)))
        return _round(gm, example_inputs, other, inner_options, mode)

    best = _round(gm, example_inputs, partitioner, inner_options, mode)
    if best.plan is None or best.plan.budget_bytes is None:
        return best.finished(), best.plan
    budget_bytes = asked = best.plan.budget_bytes
    found, rounds = best, 1
    while best.peak_bytes > budget_bytes and rounds < _ROUNDS:
        previous, asked = asked, asked - (found.peak_bytes - budget_bytes)
        try:
            found = planned_for(asked)
        except InfeasibleBudgetError as error:
            asked = error.least_feasible_bytes  # the lowest plan there is may still be enough
            if asked >= previous:
                break
            found = planned_for(asked)
        rounds += 1
        best = min(best, found, key=lambda r: r.peak_bytes)
    assert best.plan is not None
    plan = best.plan.within_inductor(budget_bytes, InductorPeak(best.peak_bytes, rounds - 1))
    if best.peak_bytes > budget_bytes:
        warnings.warn(
            f"Inductor's schedule peaks at {best.peak_bytes:,} bytes "
            f"({format_bytes(best.peak_bytes)}), above the budget of {budget_bytes:,} bytes "
            f"({format_bytes(budget_bytes)}), after {rounds} plans. Give a larger budget, or use "
            "inner='aot_eager', whose peak is the plan's.",
            InductorPeakWarning,
            stacklevel=2,
        )
    return best.finished(), plan


def _round(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    partitioner: Partitioner,
    inner_options: dict[str, Any],
    mode: str | None,
) -> _Round:
    halves: list[GeneratedHalf] = []
    plans: list[Plan] = []
    compiled = compilers.compile_inductor(
        copy.deepcopy(gm),  # inductor changes the graph that it is given
        example_inputs,
        replace(partitioner, on_plan=plans.append),
        inner_options,
        mode,
        halves.append,
    )
    peak_bytes = step_peak_bytes(halves) if plans else 0
    return _Round(compiled, plans[-1] if plans else None, peak_bytes, tuple(halves))
