"""The exact solver: no plan of its space recomputes less within the budget.

The space is that of :mod:`ckpt_pass.planner.schedule`: the anchors in their order, what is saved
kept to its last use, and every other value computed just before the anchor that needs it, dropped
and computed again as often as that pays. Its integer program (:mod:`ckpt_pass.planner.milp`) is
solved by HiGHS (Huangfu and Hall, Mathematical Programming Computation 10, 2018) through SciPy.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from ckpt_pass.errors import CkptPassError
from ckpt_pass.planner.contract import Contracted
from ckpt_pass.planner.milp import Answer, Program
from ckpt_pass.planner.problem import Problem
from ckpt_pass.planner.solution import InfeasibleBudgetError, Solution, evaluate
from ckpt_pass.planner.solve import solve


class ExactSolverError(CkptPassError):
    """The integer program and the simulator disagree: a bug of this library."""


def solve_exact(
    problem: Problem,
    budget_bytes: int,
    borders: Collection[int] = (),
    time_limit_s: float | None = None,
    node_limit: int | None = None,
    known: Solution | None = None,
) -> Solution:
    """The plan of least recompute time within a budget.

    Args:
        problem: the step.
        budget_bytes: the most bytes above what was allocated when the step began.
        borders: ops whose results cross from one layer to the next; for the layered solver, whose
            plan is what a limit falls back on.
        time_limit_s: seconds after which the best so far is returned.
        node_limit: the same in nodes of the search, the same on every machine.
        known: a plan within the budget, where one is known already.

    Returns:
        The plan; its status is ``optimal`` or ``time limit``.

    Raises:
        InfeasibleBudgetError: no plan fits, or none was found within a limit.
        UnsupportedProblemError: an op cannot be described.
        ExactSolverError: what came out does not fit the budget (a bug).
    """
    small = Contracted.of(problem)
    known = known or _layered(problem, budget_bytes, borders)
    at_most_s = None if known is None else known.recompute_time_s
    answer = Program(small, budget_bytes, at_most_s).solve(time_limit_s, node_limit)
    found = _checked(problem, budget_bytes, answer)
    if answer.status == "optimal" and found is not None:
        return replace(found, status="optimal", lower_bound_s=found.recompute_time_s)
    if answer.status == "infeasible":
        if known is not None:
            raise ExactSolverError(
                f"The exact solver found no plan within {budget_bytes:,} bytes although the "
                f"layered one did ({known.peak_bytes:,} bytes). This is a bug of ckpt_pass: please "
                "report it, and use solver='layers' meanwhile."
            )
        raise InfeasibleBudgetError(budget_bytes, least_peak(problem, time_limit_s, node_limit))
    fitting = [plan for plan in (found, known) if plan is not None]
    if not fitting:
        raise InfeasibleBudgetError(budget_bytes, least_peak(problem, time_limit_s, node_limit))
    best = min(fitting, key=lambda plan: plan.recompute_time_s)
    return replace(best, status="time limit", lower_bound_s=answer.bound_s)


def least_peak(
    problem: Problem, time_limit_s: float | None = None, node_limit: int | None = None
) -> int:
    """The least peak that a plan has, or the least that was found within a limit."""
    layered = _layered_least(problem)
    answer = Program(Contracted.of(problem), None).solve(time_limit_s, node_limit)
    if answer.saved is None or answer.drops is None:
        return layered
    return min(layered, evaluate(problem, answer.saved, "exact", answer.drops).peak_bytes)


def broken_rule(problem: Problem, plan: Solution) -> str | None:
    """What a plan does that it must not: run a bound op again, or save what cannot be saved.

    Returns:
        A sentence about the first op of which that is true; ``None`` if there is none.
    """
    ops, ran = problem.ops, set[int]()
    for index in sorted(plan.saved):
        if not ops[index].savable or ops[index].must_recompute:
            return f"It saves op {index} ({ops[index].name}), whose result cannot be saved."
    for index in plan.steps.backward:
        op = ops[index]
        bound = op.must_save and bool(op.makes or op.savable)  # views are made again
        if (op.forward and (bound or op.ordered)) or (
            index in ran and not problem.may_repeat(index) and bool(op.makes)
        ):
            return f"It runs op {index} ({op.name}) again, which must not be recomputed."
        ran.add(index)
    return None


def _layered(problem: Problem, budget_bytes: int, borders: Collection[int]) -> Solution | None:
    try:
        found = solve(problem, budget_bytes, borders)
    except InfeasibleBudgetError:
        return None
    return None if broken_rule(problem, found) else found


def _layered_least(problem: Problem) -> int:
    try:
        return solve(problem, 0).peak_bytes
    except InfeasibleBudgetError as error:
        return error.least_feasible_bytes


def _checked(problem: Problem, budget_bytes: int, answer: Answer) -> Solution | None:
    """What was found, simulated; it must fit."""
    if answer.saved is None or answer.drops is None:
        return None
    found = evaluate(problem, answer.saved, "exact", answer.drops)
    if found.peak_bytes > budget_bytes:
        raise ExactSolverError(
            f"The exact solver's plan needs {found.peak_bytes:,} bytes, expected at most "
            f"{budget_bytes:,}. This is a bug of ckpt_pass: please report it, and use "
            "solver='layers' meanwhile."
        )
    return found
