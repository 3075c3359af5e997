"""What the built-in solvers do: the layered one, the exact one, their best, uniform cuts."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import ClassVar

from ckpt_pass.planner.contract import Contracted, UnsupportedProblemError
from ckpt_pass.planner.cut import CutGraph, mean_price
from ckpt_pass.planner.exact import broken_rule, solve_exact
from ckpt_pass.planner.link import Link
from ckpt_pass.planner.offload_exact import exact_with_link
from ckpt_pass.planner.offload_solve import solve_with_link
from ckpt_pass.planner.problem import Problem
from ckpt_pass.planner.solution import (
    InfeasibleBudgetError,
    Solution,
    cheapest_first,
    evaluate,
    without_recompute,
)
from ckpt_pass.planner.solve import Pool, solve_from

# Up to this size (`Contracted.size`) `auto` asks the exact solver too. Single blocks of the
# reference models have 35 to 755, those of Mixtral 1,279; up to 755 all were solved within 3 s,
# at 1,082 some took 20 s.
_AUTO_SIZE = 800
# Nodes of HiGHS' search that `auto` allows: blocks within the size needed at most 13. A limit in
# seconds would let the machine's load change the plan.
_AUTO_NODES = 100
# Prices of a saved byte, as powers of two of the forward's mean time for each byte it makes: from
# "save whatever saves time" to "save only what is all but free", in half steps.
_PRICE_EXPONENTS = tuple(step / 2 for step in range(-20, 21))


def layers(
    problem: Problem,
    budget_bytes: int,
    borders: Collection[int] = (),
    link: Link | None = None,
) -> Solution:
    """The layered solver; with a link, and moves beside."""
    pool = Pool.of(problem, borders)
    if link is None:
        return solve_from(pool, budget_bytes)
    return solve_with_link(pool, budget_bytes, link, _layered(pool, budget_bytes)[0])


def uniform_cut(problem: Problem, budget_bytes: int) -> Solution:
    """The best time-optimal cut at one price for a saved byte, the same everywhere."""
    plans = problem.derived("uniform cuts", _uniform_cuts)
    fitting = [plan for plan in plans if plan.peak_bytes <= budget_bytes]
    if not fitting:
        raise InfeasibleBudgetError(budget_bytes, min(plan.peak_bytes for plan in plans))
    return min(fitting, key=cheapest_first)


@dataclass(frozen=True)
class NumberedCut:
    """One of the cuts at one price for a saved byte, whatever others would need or take.

    Attributes:
        number: which of those within the budget, from 0; those that recompute less come first.
    """

    number: int
    name: ClassVar[str] = "numbered-cut"

    def __call__(
        self,
        problem: Problem,
        budget_bytes: int,
        borders: Collection[int] = (),
        time_limit_s: float | None = None,
    ) -> Solution:
        """Solve (:class:`ckpt_pass.planner.solvers.Solver`).

        Raises:
            InfeasibleBudgetError: there is none of that number.
        """
        plans = problem.derived("uniform cuts", _uniform_cuts)
        fitting = [plan for plan in plans if plan.peak_bytes <= budget_bytes]
        if self.number >= len(fitting):
            raise InfeasibleBudgetError(budget_bytes, min(plan.peak_bytes for plan in plans))
        return sorted(fitting, key=cheapest_first)[self.number]


def _uniform_cuts(problem: Problem) -> tuple[Solution, ...]:
    price, graph = mean_price(problem), CutGraph.of(problem)
    prices = (0.0, *(price * 2.0**exponent for exponent in _PRICE_EXPONENTS))
    cuts = dict.fromkeys(graph.solve(price) for price in prices)
    return tuple(evaluate(problem, saved, "uniform cut") for saved in cuts)


def exact(
    problem: Problem,
    budget_bytes: int,
    borders: Collection[int],
    time_limit_s: float | None,
    link: Link | None = None,
) -> Solution:
    """The plan of least recompute time, for small steps; begins with the layered solver's.

    With a link it is that of the shortest step, for very small ones.
    """
    if link is not None:
        return exact_with_link(problem, budget_bytes, link)
    known, least_bytes = _layered(Pool.of(problem, borders), budget_bytes)
    known_bytes = least_bytes if least_bytes > budget_bytes else None
    return solve_exact(problem, budget_bytes, time_limit_s, known=known, known_bytes=known_bytes)


@dataclass(frozen=True)
class Auto:
    """The layered solver, and the exact one besides where the step is small enough.

    With a link their plan is one of those from which the joint plan is found.

    Without a time limit the same problem and budget give the same plan.

    Attributes:
        size: the most decisions to recompute for which the exact solver is asked.
        nodes: what its search may visit.
    """

    size: int = _AUTO_SIZE
    nodes: int = _AUTO_NODES
    name: ClassVar[str] = "auto"

    def __call__(
        self,
        problem: Problem,
        budget_bytes: int,
        borders: Collection[int] = (),
        time_limit_s: float | None = None,
        link: Link | None = None,
    ) -> Solution:
        """Solve (:class:`LinkSolver`)."""
        pool = Pool.of(problem, borders)
        if link is None:
            return self._without_link(pool, budget_bytes, time_limit_s)
        known: Solution | None = None
        with contextlib.suppress(InfeasibleBudgetError):
            known = self._without_link(pool, budget_bytes, time_limit_s)
        return solve_with_link(pool, budget_bytes, link, known)

    def _without_link(self, pool: Pool, budget_bytes: int, time_limit_s: float | None) -> Solution:
        problem = pool.problem
        known, least_bytes = _layered(pool, budget_bytes)
        if known is not None and known.status == "optimal":
            return _told(known, "its lower bound proves it")
        why_not = self._why_not_exact(problem)
        if why_not is None:
            return self._with_exact(problem, budget_bytes, time_limit_s, known, least_bytes)
        if known is None:
            raise InfeasibleBudgetError(budget_bytes, least_bytes)
        return _told(known, why_not)

    def _why_not_exact(self, problem: Problem) -> str | None:
        try:
            size = Contracted.of(problem).size
        except UnsupportedProblemError:
            return "the exact solver cannot describe the step"
        if size > self.size:
            return f"{size:,} choices are too many for the exact solver"
        return None

    def _with_exact(
        self,
        problem: Problem,
        budget_bytes: int,
        time_limit_s: float | None,
        known: Solution | None,
        least_bytes: int,
    ) -> Solution:
        try:
            known_bytes = least_bytes if least_bytes > budget_bytes else None
            found = solve_exact(problem, budget_bytes, time_limit_s, self.nodes, known, known_bytes)
        except InfeasibleBudgetError as error:
            # The layered plan may fit and break a rule, so that its peak is none to name.
            plain_bytes = without_recompute(problem).peak_bytes
            peaks = (least_bytes, error.least_feasible_bytes, plain_bytes)
            least_bytes = min((n for n in peaks if n > budget_bytes), default=plain_bytes)
            raise InfeasibleBudgetError(budget_bytes, least_bytes) from None
        if known is None:
            return _told(found, "the layered solver found nothing that fits")
        bound = max(found.lower_bound_s, known.lower_bound_s)
        if found.recompute_time_s < known.recompute_time_s:
            return _told(replace(found, lower_bound_s=bound), "faster than the layered plan")
        proven = "proven by" if found.status == "optimal" else "not beaten by"
        status = "optimal" if found.status == "optimal" else known.status
        kept = replace(known, status=status, lower_bound_s=min(bound, known.recompute_time_s))
        return _told(kept, f"{proven} the exact solver")


def _layered(pool: Pool, budget_bytes: int) -> tuple[Solution | None, int]:
    """The layered solver's plan, or the least peak that it found."""
    problem = pool.problem
    try:
        found = solve_from(pool, budget_bytes)
    except InfeasibleBudgetError as error:
        return None, error.least_feasible_bytes
    return (None if broken_rule(problem, found) else found), found.peak_bytes


def _told(plan: Solution, why: str) -> Solution:
    return replace(plan, solver=f"{plan.solver} ({why})")
