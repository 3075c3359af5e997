"""The trade-off curve as it is planned: nothing runs."""

from __future__ import annotations

from typing import Any

from torch import nn

from ckpt_pass.planner.solution import InfeasibleBudgetError
from ckpt_pass.plans.step_plan import StepPlan
from ckpt_pass.plans.value import Plan
from ckpt_pass.tools.ahead import plan


def budgets_between(least: int, plain: int, points: int) -> list[int]:
    """Budgets in equal ratios, falling from the last: from the least to the plain step's peak.

    Args:
        least: the least peak that a plan reaches.
        plain: the peak with nothing recomputed; it comes last.
        points: how many, two or more.
    """
    ratio = (plain / least) ** (1 / (points - 1))
    between = {round(least * ratio**number) for number in range(1, points - 1)}
    return [*sorted({least} | between - {plain}), plain]


def planned_curve(
    model: nn.Module, *args: Any, points: int, **options: Any
) -> tuple[Plan | StepPlan, ...]:
    """Plans of a step for a row of budgets below the peak of the step with nothing recomputed.

    Args:
        model, args: as for :func:`ckpt_pass.plan`.
        points: how many plans; the first has the least peak that is found.
        options: as for :func:`ckpt_pass.plan`, without a budget.
    """
    plain = plan(model, *args, budget=1.0, **options).budget_bytes
    assert plain is not None
    try:
        least = plan(model, *args, budget=1, **options).peak_bytes or 1
    except InfeasibleBudgetError as error:
        least = error.least_feasible_bytes
    found = []
    for budget in budgets_between(least, plain, points + 1)[:-1]:
        found.append(plan(model, *args, budget=max(budget, 1), **options))
    return tuple(found)
