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
from ckpt_pass.compile.engine import Partitioner
from ckpt_pass.graph.kernels import WORKSPACE, Kernels
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
        return best.compiled, best.plan
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
    return best.compiled, plan


def _workspaces_of(nodes: Sequence[fx.Node]) -> dict[fx.Node, int]:
    facts = Kernels().facts(nodes, WORKSPACE)
    return {node: found.workspace_bytes or 0 for node, found in facts.items()}


def _round(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    partitioner: Partitioner,
    inner_options: dict[str, Any],
    mode: str | None,
) -> _Round:
    halves: list[compilers.HalfPeak] = []
    plans: list[Plan] = []
    compiled = compilers.compile_inductor(
        copy.deepcopy(gm),  # inductor changes the graph that it is given
        example_inputs,
        replace(partitioner, on_plan=plans.append),
        inner_options,
        mode,
        halves.append,
        _workspaces_of,
    )
    plan = plans[-1] if plans else None
    outputs = plan.predicted.output_bytes if plan else 0
    held = outputs if isinstance(outputs, int) else 0
    return _Round(compiled, plan, _peak_bytes(halves, held))


def _peak_bytes(halves: Sequence[compilers.HalfPeak], held_bytes: int) -> int:
    """The peak of a step.

    During the backward there is more than inductor counts. The caller holds the outputs and brings
    tangents like them. And a copy of an input in another layout (of weights and images, for
    convolutions), saved by inductor's forward, stands for that input, which it does not count.
    """
    left = max((half.left_bytes for half in halves if not half.is_backward), default=0)
    peaks = [0]
    for half in halves:
        copies = max(left - held_bytes - half.given_bytes, 0)
        peaks.append(half.peak_bytes + (copies + 2 * held_bytes if half.is_backward else 0))
    return max(peaks)
