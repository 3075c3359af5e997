"""The solvers that have a name, and the way from what a user passes to a checked solution."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias, TypeGuard, runtime_checkable

from ckpt_pass._errors import CkptPassError, nearest
from ckpt_pass.planner.built_in import Auto as Auto
from ckpt_pass.planner.built_in import exact, layers, uniform_cut
from ckpt_pass.planner.exact import broken_rule
from ckpt_pass.planner.link import Link
from ckpt_pass.planner.moves import InvalidMoveError, Movable
from ckpt_pass.planner.problem import Problem
from ckpt_pass.planner.solution import Solution, evaluate

# A lower bound may exceed a time by rounding, relatively by no more than this.
_ROUNDING = 1e-6


class UnknownSolverError(CkptPassError):
    """No solver has that name, or the object given is not a solver."""


class InvalidTimeLimitError(CkptPassError):
    """The time limit is not a positive number of seconds."""


class WrongSolutionError(CkptPassError):
    """A solver returned something that is no plan within the budget."""


class NoLinkSolverError(CkptPassError):
    """Values may be moved, and the solver knows nothing of that."""


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


class LinkSolver(Solver, Protocol):
    """A solver that may also move values, where it is given a link."""

    def __call__(
        self,
        problem: Problem,
        budget_bytes: int,
        borders: Collection[int] = (),
        time_limit_s: float | None = None,
        link: Link | None = None,
    ) -> Solution:
        """Solve (:class:`Solver`).

        Args:
            problem, budget_bytes, borders, time_limit_s: see :class:`Solver`.
            link: what moves values; ``None`` for plans without moves. With one, plans are compared
                by the time of their step by the clock.
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
        link: Link | None = None,
    ) -> Solution:
        """Solve (:class:`LinkSolver`); the function is told of a link only where there is one."""
        offered: dict[str, Any] = {"borders": borders, "time_limit_s": time_limit_s}
        if link is not None:
            offered["link"] = link
        taken = {key: value for key, value in offered.items() if _takes(self.function, key)}
        return self.function(problem, budget_bytes, **taken)

    @property
    def knows_links(self) -> bool:
        """Whether the function takes a link."""
        return _takes(self.function, "link")


def _takes(function: Callable[..., object], name: str) -> bool:
    """Whether a function takes a keyword argument."""
    known = inspect.signature(function).parameters
    return name in known or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())


# The layered solver is never long at it, so that a time limit changes nothing.
_BUILT_IN: tuple[Solver, ...] = (
    Auto(),
    FunctionSolver("layers", layers),
    FunctionSolver("exact", exact),
    FunctionSolver("uniform-cut", uniform_cut),
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
            ``solver(problem, budget_bytes)`` that may also take ``borders``, ``time_limit_s`` and
            ``link``.

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
    link: Link | None = None,
) -> Solution:
    """Solve, and check what came out: its numbers are those of the simulator and the clock.

    Args:
        solver: see :func:`as_solver`.
        problem, budget_bytes, borders, time_limit_s: see :class:`Solver`.
        link: what may move values; without one nothing moves.

    Raises:
        NoLinkSolverError: there is a link, and the solver knows nothing of it.
        UnknownSolverError: there is no such solver.
        InvalidTimeLimitError: the limit is no positive number of seconds.
        InfeasibleBudgetError: no plan that the solver found fits.
        WrongSolutionError: the solver returned something that is no plan within the budget.
    """
    chosen = as_solver(solver)
    limit = checked_time_limit(time_limit_s)
    if link is None:
        found = chosen(problem, budget_bytes, borders, limit)
    elif _knows_links(chosen):
        found = chosen(problem, budget_bytes, borders, limit, link=link)
    else:
        raise NoLinkSolverError(
            f"Solver {chosen.name!r} knows nothing of moving values, and a link is given; expected "
            "a solver that takes a link. Use solver='auto', or plan without offloading."
        )
    return _checked(chosen.name, problem, budget_bytes, found, link)


def _knows_links(solver: Solver) -> TypeGuard[LinkSolver]:
    if isinstance(solver, FunctionSolver):
        return solver.knows_links
    return _takes(solver, "link")


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


def _checked(
    name: str, problem: Problem, budget_bytes: int, found: object, link: Link | None
) -> Solution:
    """A solver's answer with the numbers of the simulator and the clock.

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
    if found.moves and link is None:
        raise WrongSolutionError(f"{what} a plan with moves, and there is no link. {cure}")
    try:
        real = evaluate(problem, found.saved, found.solver, found.drops, found.moves, link)
    except InvalidMoveError as error:
        raise WrongSolutionError(f"{what} a plan that cannot run. {error} {cure}") from error
    broken = broken_rule(problem, real)
    if broken:
        raise WrongSolutionError(f"{what} a plan that breaks a rule. {broken} {cure}")
    if real.peak_bytes > budget_bytes:
        raise WrongSolutionError(
            f"{what} a plan that peaks at {real.peak_bytes:,} bytes, expected at most "
            f"{budget_bytes:,}; a solver that finds none raises InfeasibleBudgetError. {cure}"
        )
    if link is not None and problem.must_move:
        known = set(Movable.of(problem, real.steps).storage.tolist())
        left = known.intersection(problem.must_move) - {move.storage for move in real.moves}
        if left:
            raise WrongSolutionError(
                f"{what} a plan that leaves storage {min(left)} where it is, expected that it is "
                f"moved. {cure}"
            )
    if link is not None and real.times and not link.may_hold(real.times.host_peak_bytes):
        raise WrongSolutionError(
            f"{what} a plan that moves {real.times.host_peak_bytes:,} bytes at a time, expected at "
            f"most {link.host_bytes:,}. {cure}"
        )
    if found.lower_bound_s > real.overhead_s * (1 + _ROUNDING):
        raise WrongSolutionError(
            f"{what} a lower bound of {found.lower_bound_s} s above its own plan's recompute time "
            f"of {real.overhead_s} s, expected at most that. {cure}"
        )
    return replace(real, status=found.status, lower_bound_s=found.lower_bound_s)
