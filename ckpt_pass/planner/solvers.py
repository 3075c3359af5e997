"""The solvers that have a name, and the way from what a user passes to a checked solution."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import ClassVar, Protocol, TypeAlias, runtime_checkable

from ckpt_pass._errors import CkptPassError, nearest
from ckpt_pass.planner.contract import Contracted, UnsupportedProblemError
from ckpt_pass.planner.cut import CutGraph, mean_price
from ckpt_pass.planner.exact import broken_rule, solve_exact
from ckpt_pass.planner.problem import Problem
from ckpt_pass.planner.solution import InfeasibleBudgetError, Solution, cheapest_first, evaluate
from ckpt_pass.planner.solve import solve

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
# A lower bound may exceed a time by rounding, relatively by no more than this.
_ROUNDING = 1e-6


class UnknownSolverError(CkptPassError):
    """No solver has that name, or the object given is not a solver."""


class InvalidTimeLimitError(CkptPassError):
    """The time limit is not a positive number of seconds."""


class WrongSolutionError(CkptPassError):
    """A solver returned something that is no plan within the budget."""


@runtime_checkable
class Solver(Protocol):
    """From a problem and a budget to a plan within it."""

    @property
    def name(self) -> str:
        """In kebab case."""
        ...

    def __call__(
        self,
        problem: Problem,
        budget_bytes: int,
        borders: Collection[int] = (),
        time_limit_s: float | None = None,
    ) -> Solution:
        """Solve.

        Args:
            problem: the step.
            budget_bytes: the most bytes above what was allocated when the step began.
            borders: ops whose results cross from one layer to the next.
            time_limit_s: seconds after which the best so far is returned; ``None`` for no limit.

        Raises:
            InfeasibleBudgetError: no plan that it found fits.
        """
        ...


#: What users may pass: a name, a solver, or any callable with a solver's arguments.
SolverLike: TypeAlias = "str | Solver | Callable[..., Solution]"


@dataclass(frozen=True)
class FunctionSolver:
    """A function as a solver; it gets those arguments that it takes.

    Attributes:
        name: in kebab case.
        function: called as a :class:`Solver` is.
    """

    name: str
    function: Callable[..., Solution] = field(repr=False)

    def __call__(
        self,
        problem: Problem,
        budget_bytes: int,
        borders: Collection[int] = (),
        time_limit_s: float | None = None,
    ) -> Solution:
        """Solve (:class:`Solver`)."""
        offered = {"borders": borders, "time_limit_s": time_limit_s}
        taken = inspect.signature(self.function).parameters
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values()):
            offered = {key: value for key, value in offered.items() if key in taken}
        return self.function(problem, budget_bytes, **offered)


def _uniform_cut(problem: Problem, budget_bytes: int) -> Solution:
    """The best time-optimal cut at one price for a saved byte, the same everywhere."""
    plans = problem.derived("uniform cuts", _uniform_cuts)
    fitting = [plan for plan in plans if plan.peak_bytes <= budget_bytes]
    if not fitting:
        raise InfeasibleBudgetError(budget_bytes, min(plan.peak_bytes for plan in plans))
    return min(fitting, key=cheapest_first)


def _uniform_cuts(problem: Problem) -> tuple[Solution, ...]:
    price, graph = mean_price(problem), CutGraph.of(problem)
    prices = (0.0, *(price * 2.0**exponent for exponent in _PRICE_EXPONENTS))
    cuts = dict.fromkeys(graph.solve(price) for price in prices)
    return tuple(evaluate(problem, saved, "uniform cut") for saved in cuts)


def _exact(
    problem: Problem,
    budget_bytes: int,
    borders: Collection[int],
    time_limit_s: float | None,
) -> Solution:
    """The plan of least recompute time, for small steps; begins with the layered solver's."""
    known, least_bytes = _layered(problem, budget_bytes, borders)
    known_bytes = least_bytes if least_bytes > budget_bytes else None
    return solve_exact(problem, budget_bytes, time_limit_s, known=known, known_bytes=known_bytes)


@dataclass(frozen=True)
class Auto:
    """The layered solver, and the exact one besides where the step is small enough.

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
    ) -> Solution:
        """Solve (:class:`Solver`)."""
        known, least_bytes = _layered(problem, budget_bytes, borders)
        if known is not None and known.status == "optimal":
            return _told(known, "its lower bound proves it")
        why_not = self._why_not_exact(problem)
        if why_not is None:
            return self._with_exact(
                problem, budget_bytes, borders, time_limit_s, known, least_bytes
            )
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
        borders: Collection[int],
        time_limit_s: float | None,
        known: Solution | None,
        least_bytes: int,
    ) -> Solution:
        try:
            known_bytes = least_bytes if least_bytes > budget_bytes else None
            found = solve_exact(problem, budget_bytes, time_limit_s, self.nodes, known, known_bytes)
        except InfeasibleBudgetError as error:
            least_bytes = min(least_bytes, error.least_feasible_bytes)
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


def _layered(
    problem: Problem, budget_bytes: int, borders: Collection[int]
) -> tuple[Solution | None, int]:
    """The layered solver's plan, or the least peak that it found."""
    try:
        found = solve(problem, budget_bytes, borders)
    except InfeasibleBudgetError as error:
        return None, error.least_feasible_bytes
    return (None if broken_rule(problem, found) else found), found.peak_bytes


def _told(plan: Solution, why: str) -> Solution:
    return replace(plan, solver=f"{plan.solver} ({why})")


# The layered solver is never long at it, so that a time limit changes nothing.
_BUILT_IN: tuple[Solver, ...] = (
    Auto(),
    FunctionSolver("layers", solve),
    FunctionSolver("exact", _exact),
    FunctionSolver("uniform-cut", _uniform_cut),
)
#: Every named solver. The names are the public interface.
SOLVERS: Mapping[str, Solver] = MappingProxyType({solver.name: solver for solver in _BUILT_IN})
DEFAULT_SOLVER = "auto"


def solver_names() -> tuple[str, ...]:
    """The names of the solvers."""
    return tuple(SOLVERS)


def as_solver(solver: SolverLike) -> Solver:
    """Turn what a user passed into a solver.

    Args:
        solver: a name (:func:`solver_names` lists them), a solver, or a callable
            ``solver(problem, budget_bytes)`` that may also take ``borders`` and ``time_limit_s``.

    Raises:
        UnknownSolverError: no solver has that name, or the object is none of these.
    """
    known = ", ".join(SOLVERS)
    if isinstance(solver, str):
        if solver not in SOLVERS:
            raise UnknownSolverError(
                f"There is no solver named {solver!r}.{nearest(solver, SOLVERS)} "
                f"Known solvers: {known}."
            )
        return SOLVERS[solver]
    if isinstance(solver, type) or not callable(solver):
        raise UnknownSolverError(
            f"Got solver={solver!r}, expected the name of a solver ({known}), a solver, or a "
            "callable solver(problem, budget_bytes) that returns a Solution."
        )
    if isinstance(solver, Solver):
        return solver
    return FunctionSolver(getattr(solver, "__name__", type(solver).__name__), solver)


def run_solver(
    solver: SolverLike,
    problem: Problem,
    budget_bytes: int,
    borders: Collection[int] = (),
    time_limit_s: float | None = None,
) -> Solution:
    """Solve, and check what came out: its numbers are those of the simulator.

    Args:
        solver: see :func:`as_solver`.
        problem, budget_bytes, borders, time_limit_s: see :class:`Solver`.

    Raises:
        UnknownSolverError: there is no such solver.
        InvalidTimeLimitError: the limit is no positive number of seconds.
        InfeasibleBudgetError: no plan that the solver found fits.
        WrongSolutionError: the solver returned something that is no plan within the budget.
    """
    chosen = as_solver(solver)
    limit = checked_time_limit(time_limit_s)
    return _checked(
        chosen.name, problem, budget_bytes, chosen(problem, budget_bytes, borders, limit)
    )


def checked_time_limit(time_limit_s: float | None) -> float | None:
    """A time limit in seconds; ``None`` for none.

    Raises:
        InvalidTimeLimitError: it is no positive number.
    """
    if time_limit_s is None:
        return None
    number = isinstance(time_limit_s, (int, float)) and not isinstance(time_limit_s, bool)
    if not number or not math.isfinite(time_limit_s) or time_limit_s <= 0:
        raise InvalidTimeLimitError(
            f"Got time_limit_s={time_limit_s!r}, expected a positive number of seconds, or None "
            "for no limit. Give 5 for five seconds."
        )
    return float(time_limit_s)


def _checked(name: str, problem: Problem, budget_bytes: int, found: object) -> Solution:
    """A solver's answer with the simulator's numbers.

    Raises:
        WrongSolutionError: it is no plan within the budget.
    """
    what = f"Solver {name!r} returned"
    cure = "Correct the solver, or use solver='auto'."
    if not isinstance(found, Solution):
        raise WrongSolutionError(
            f"{what} {found!r}, expected a Solution: make one with evaluate(problem, saved, "
            f"drops=drops). {cure}"
        )
    named = {*found.saved, *(index for drop in found.drops for index in drop)}
    strange = sorted(index for index in named if not 0 <= index < len(problem.ops))
    if strange:
        raise WrongSolutionError(
            f"{what} a plan that names op {strange[0]}, expected indices below "
            f"{len(problem.ops)}: it belongs to another problem. {cure}"
        )
    real = evaluate(problem, found.saved, found.solver, found.drops)
    broken = broken_rule(problem, real)
    if broken:
        raise WrongSolutionError(f"{what} a plan that breaks a rule. {broken} {cure}")
    if real.peak_bytes > budget_bytes:
        raise WrongSolutionError(
            f"{what} a plan that peaks at {real.peak_bytes:,} bytes, expected at most "
            f"{budget_bytes:,}; a solver that finds none raises InfeasibleBudgetError. {cure}"
        )
    if found.lower_bound_s > real.recompute_time_s * (1 + _ROUNDING):
        raise WrongSolutionError(
            f"{what} a lower bound of {found.lower_bound_s} s above its own plan's recompute time "
            f"of {real.recompute_time_s} s, expected at most that. {cure}"
        )
    return replace(real, status=found.status, lower_bound_s=found.lower_bound_s)
