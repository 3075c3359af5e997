"""The exact solver: no plan of its space recomputes less within the budget.

The space is that of :mod:`ckpt_pass.planner.schedule`: the anchors in their order, what is saved
kept to its last use, and every other value computed just before the anchor that needs it, dropped
and computed again as often as that pays. Its integer program (:mod:`ckpt_pass.planner.milp`) is
solved by HiGHS (Huangfu and Hall, Mathematical Programming Computation 10, 2018) through SciPy.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_array

from ckpt_pass._errors import CkptPassError
from ckpt_pass.planner.contract import Contracted
from ckpt_pass.planner.milp import Program
from ckpt_pass.planner.problem import Problem
from ckpt_pass.planner.schedule import Drop
from ckpt_pass.planner.solution import InfeasibleBudgetError, Solution, evaluate
from ckpt_pass.planner.solve import solve


@dataclass(frozen=True)
class Answer:
    """What HiGHS found.

    Attributes:
        status: ``optimal``, ``infeasible`` or ``limit``.
        saved, drops: the plan; ``None`` where nothing was found.
        bound_s: no plan within the budget recomputes less.
    """

    status: str
    saved: frozenset[int] | None
    drops: frozenset[Drop] | None
    bound_s: float


class ExactSolverError(CkptPassError):
    """The integer program and the simulator disagree: a bug of this library."""


def solve_exact(
    problem: Problem,
    budget_bytes: int,
    time_limit_s: float | None = None,
    node_limit: int | None = None,
    known: Solution | None = None,
    known_bytes: int | None = None,
) -> Solution:
    """The plan of least recompute time within a budget.

    Args:
        problem: the step.
        budget_bytes: the most bytes above what was allocated when the step began.
        time_limit_s: seconds after which the best so far is returned.
        node_limit: the same in nodes of the search, the same on every machine.
        known: a plan within the budget, where one is known already: what a limit falls back on.
            It must keep the rules (:func:`broken_rule`).
        known_bytes: the least peak that is known of plans, where none within the budget is.

    Returns:
        The plan; its status is ``optimal`` or ``time limit``.

    Raises:
        InfeasibleBudgetError: no plan fits, or none was found within a limit.
        UnsupportedProblemError: an op cannot be described.
        ExactSolverError: what came out does not fit the budget (a bug).
    """
    at_most_s = None if known is None else known.recompute_time_s
    answer = _ask(
        Program(Contracted.of(problem), budget_bytes, at_most_s), time_limit_s, node_limit
    )
    found = _checked(problem, budget_bytes, answer)
    if answer.status == "optimal" and found is not None:
        return replace(found, status="optimal", lower_bound_s=found.recompute_time_s)
    if answer.status == "infeasible" and known is not None:
        raise ExactSolverError(
            f"The exact solver found no plan within {budget_bytes:,} bytes although one was known "
            f"({known.peak_bytes:,} bytes). This is a bug of ckpt_pass: please report it, and use "
            "solver='layers' meanwhile."
        )
    if answer.status == "infeasible":
        raise InfeasibleBudgetError(
            budget_bytes, least_peak(problem, time_limit_s, node_limit, known_bytes)
        )
    fitting = [plan for plan in (found, known) if plan is not None]
    best = min(fitting, key=lambda plan: plan.recompute_time_s, default=None)
    if best is None:
        raise InfeasibleBudgetError(
            budget_bytes, least_peak(problem, time_limit_s, node_limit, known_bytes)
        )
    return replace(best, status="time limit", lower_bound_s=answer.bound_s)


def least_peak(
    problem: Problem,
    time_limit_s: float | None = None,
    node_limit: int | None = None,
    known_bytes: int | None = None,
) -> int:
    """The least peak that a plan has, or the least that was found within a limit.

    Args:
        problem: the step.
        time_limit_s, node_limit: see :func:`solve_exact`.
        known_bytes: a peak that some plan has, which spares the search all that is above it; the
            layered solver's least where ``None``.
    """
    if known_bytes is None:
        known_bytes = _layered_least(problem)
    program = Program(Contracted.of(problem), None, at_most_bytes=known_bytes)
    answer = _ask(program, time_limit_s, node_limit)
    if answer.saved is None or answer.drops is None:
        return known_bytes
    return min(known_bytes, evaluate(problem, answer.saved, "exact", answer.drops).peak_bytes)


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


def _ask(program: Program, time_limit_s: float | None, node_limit: int | None) -> Answer:
    """Ask HiGHS.

    Args:
        time_limit_s: seconds after which the best so far is the answer.
        node_limit: the same in nodes of its search tree, which is the same on every machine.
    """
    options: dict[str, float] = {"mip_rel_gap": 0.0}
    if time_limit_s is not None:
        options["time_limit"] = time_limit_s
    if node_limit is not None:
        options["node_limit"] = node_limit
    cost = np.zeros(len(program.upper))
    for variable, factor in program.cost.items():
        cost[variable] = factor
    found = milp(
        cost,
        integrality=np.array(program.integer, dtype=np.int64),
        bounds=Bounds(0.0, np.array(program.upper)),
        constraints=_constraints(program),
        options=options,
    )
    return _answer(program, found)


def _constraints(program: Program) -> LinearConstraint:
    heads = [k for k, (total, _) in enumerate(program.rows) for _ in total]
    tails = [variable for total, _ in program.rows for variable in total]
    factors = [factor for total, _ in program.rows for factor in total.values()]
    shape = (len(program.rows), len(program.upper))
    matrix = csr_array((factors, (heads, tails)), shape=shape)
    return LinearConstraint(matrix, -np.inf, np.array([bound for _, bound in program.rows]))


def _answer(program: Program, found: OptimizeResult) -> Answer:
    status = {0: "optimal", 2: "infeasible"}.get(found.status, "limit")
    bound = max(0.0, float(getattr(found, "mip_dual_bound", None) or 0.0)) / program.second
    if found.x is None:
        return Answer(status, None, None, bound)
    chosen = found.x > 0.5
    values = program.small.values
    saved = {values[s].saver for s, variable in program.save.items() if chosen[variable]}
    return Answer(
        status, frozenset(i for i in saved if i is not None), _drops(program, chosen), bound
    )


def _drops(program: Program, chosen: NDArray[np.bool_]) -> frozenset[Drop]:
    """What runs again is dropped after its last use before."""
    stages, makers = program.small.stages, program.small.makers
    places: dict[int, list[int]] = defaultdict(list)
    touched: dict[int, set[int]] = defaultdict(set)  # maker -> stages that use what it made
    for (place, index), variable in program.run.items():
        if chosen[variable]:
            places[index].append(place)
            touched[index].add(place)
            for storage in makers[index].reads:
                touched[program.small.values[storage].maker].add(place)
    for place, stage in enumerate(stages):
        for storage in stage.reads if stage.late else ():
            touched[program.small.values[storage].maker].add(place)
    return frozenset(
        (stages[max(p for p in touched[index] if first <= p < second)].anchor, index)
        for index, runs in places.items()
        for first, second in pairwise(sorted(runs))
    )
