"""A solution: what to save and what to drop, and what the simulator says of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from ckpt_pass._errors import CkptPassError
from ckpt_pass.planner.clock import Times, clock
from ckpt_pass.planner.cut import CutGraph
from ckpt_pass.planner.link import Link
from ckpt_pass.planner.liveness import MemoryProfile, simulate
from ckpt_pass.planner.moves import Move, check_moves
from ckpt_pass.planner.problem import Problem, needed_by
from ckpt_pass.planner.schedule import Drop, Schedule, schedule


class InfeasibleBudgetError(CkptPassError):
    """No plan that the solver found fits the budget.

    Attributes:
        least_feasible_bytes: the least peak that it found; planning with that number works.
    """

    def __init__(self, budget_bytes: int, least_feasible_bytes: int, why: str = "") -> None:
        self.budget_bytes = budget_bytes
        self.least_feasible_bytes = least_feasible_bytes
        super().__init__(
            f"No plan fits a peak of {budget_bytes:,} bytes; the least that was found is "
            f"{least_feasible_bytes:,} bytes. Give that budget or more, or make the step smaller "
            "(batch, sequence length); MUST_SAVE tags and policies that save also raise the least."
            + (f" {why}" if why else "")
        )


@dataclass(frozen=True)
class Solution:
    """What to save, and what that costs; the numbers come from the simulator.

    Attributes:
        drops: what is not kept in the backward, so that it is computed again later.
        steps: the order in which the step runs, and what it saves.
        profile: bytes over time.
        recompute_time_s, recompute_flops: of all forward ops that run again.
        solver: what found it, in words.
        status: ``optimal`` (no plan recomputes less), ``feasible``, or ``time limit`` (the best
            that was found in time).
        lower_bound_s: no plan within the budget has less recompute time (with a link: less
            :attr:`overhead_s`), in the order of the backward that all plans have here; 0 where
            nothing is known.
        moves: what leaves the device and comes back.
        times: the step by the clock, where a link was given.
    """

    drops: frozenset[Drop]
    steps: Schedule
    profile: MemoryProfile
    recompute_time_s: float
    recompute_flops: int
    solver: str
    status: str = "feasible"
    lower_bound_s: float = 0.0
    moves: tuple[Move, ...] = ()
    times: Times | None = None

    @property
    def overhead_s(self) -> float:
        """Recompute time, and what the ops wait for copies."""
        return self.recompute_time_s + (self.times.stall_s if self.times else 0.0)

    @property
    def saved(self) -> frozenset[int]:
        """Indices of the ops whose results are saved."""
        return self.steps.saved

    @property
    def peak_bytes(self) -> int:
        """The simulated peak."""
        return self.profile.peak_bytes


def evaluate(
    problem: Problem,
    saved: Collection[int],
    solver: str = "given",
    drops: Collection[Drop] = (),
    moves: Sequence[Move] = (),
    link: Link | None = None,
) -> Solution:
    """Simulate what is saved, dropped and moved; what the backward does not read is left out of it.

    Args:
        problem: the step.
        saved, drops: see :func:`ckpt_pass.planner.schedule.schedule`.
        solver: what found the plan, in words.
        moves: what leaves the device and comes back.
        link: what moves it; without one nothing is known of the time of the copies.

    Raises:
        InvalidMoveError: a move cannot be carried out.
    """
    dropped = frozenset(drops)
    steps = schedule(problem, saved, dropped)
    check_moves(problem, steps, moves)
    return solution_of(problem, steps, dropped, solver, moves, link)


def solution_of(
    problem: Problem,
    steps: Schedule,
    drops: frozenset[Drop],
    solver: str,
    moves: Sequence[Move] = (),
    link: Link | None = None,
) -> Solution:
    """The same for a schedule that is made, and moves that were checked."""
    again = repeated(problem, steps.backward)
    return Solution(
        drops=drops,
        steps=steps,
        profile=simulate(problem, steps, moves),
        recompute_time_s=sum(problem.ops[i].time_s for i in again),
        recompute_flops=sum(problem.ops[i].flops for i in again),
        solver=solver,
        moves=tuple(sorted(moves)),
        times=None if link is None else clock(problem, steps, moves, link),
    )


def repeated(problem: Problem, order: Iterable[int]) -> list[int]:
    """The ops of a backward that are recomputation: the forward's, and what runs once more."""
    forward, ran = problem.forward_ops, set[int]()
    found = []
    for index in order:
        if index in forward or index in ran:
            found.append(index)
        else:
            ran.add(index)
    return found


def without_recompute(problem: Problem) -> Solution:
    """The step that recomputes nothing that takes time."""
    return problem.derived(
        "no recomputation",
        lambda made: evaluate(made, CutGraph.of(made).solve(0.0), "no recomputation"),
    )


def cheapest_first(
    plan: Solution,
) -> tuple[float, int, int, list[int], list[Drop], tuple[Move, ...]]:
    """Time, then flops, then peak; what it saves, drops and moves makes the order total.

    The time is that of the whole step where the clock has told it. Plans with and without are not
    to be compared.
    """
    time = plan.recompute_time_s if plan.times is None else plan.times.step_time_s
    choices = sorted(plan.saved), sorted(plan.drops), plan.moves
    return time, plan.recompute_flops, plan.peak_bytes, *choices


def step_time(problem: Problem) -> float:
    """Seconds of the step with nothing recomputed."""
    live = needed_by(problem.ops, (*problem.forward_roots, *problem.backward_outputs), frozenset())
    return sum(problem.ops[index].time_s for index in live)
