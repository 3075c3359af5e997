"""What a plan is asked for: the budget, and how it is to be met."""

from __future__ import annotations

from dataclasses import dataclass

from ckpt_pass._errors import CkptPassError, nearest
from ckpt_pass.planner.solvers import (
    DEFAULT_SOLVER,
    SOLVERS,
    Solver,
    SolverLike,
    as_solver,
    checked_time_limit,
)
from ckpt_pass.plans.budget import BudgetLike, check_budget

COSTS = ("roofline", "measured")


class UnknownCostError(CkptPassError):
    """A cost model that there is not."""


@dataclass(frozen=True)
class Goal:
    """A budget and how it is to be met; made by :func:`as_goal`.

    Attributes:
        budget: the peak to stay within.
        solver: what looks for the plan.
        time_limit_s: seconds for the solver, if any.
        cost: ``roofline`` (modelled times) or ``measured`` (each kernel is run and timed once).
    """

    budget: BudgetLike
    solver: Solver
    time_limit_s: float | None = None
    cost: str = "roofline"

    @property
    def is_plain_data(self) -> bool:
        """Whether its ``repr`` says all about it, on every run."""
        named = any(self.solver is solver for solver in SOLVERS.values())
        return named and self.time_limit_s is None and self.budget != "device"

    def __str__(self) -> str:
        limit = "" if self.time_limit_s is None else f", {self.time_limit_s} s"
        return f"budget {self.budget}, solver {self.solver.name}, cost {self.cost}{limit}"


def as_goal(
    budget: BudgetLike | None,
    solver: SolverLike = DEFAULT_SOLVER,
    time_limit_s: float | None = None,
    cost: str = "roofline",
) -> Goal | None:
    """Check what a user asks for; ``None`` without a budget.

    Raises:
        InvalidBudgetError, UnknownSolverError, InvalidTimeLimitError, UnknownCostError: an
            argument is not one of these; checked without a budget too.
    """
    chosen, limit = as_solver(solver), checked_time_limit(time_limit_s)
    if cost not in COSTS:
        raise UnknownCostError(
            f"Got cost={cost!r}, expected one of {', '.join(COSTS)}.{nearest(str(cost), COSTS)}"
        )
    return None if budget is None else Goal(check_budget(budget), chosen, limit, cost)
