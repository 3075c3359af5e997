"""Joint plans against all there are: brute force, the exact solver, and the solvers users call."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pytest

from ckpt_pass.planner.contract import UnsupportedProblemError
from ckpt_pass.planner.link import Link
from ckpt_pass.planner.moves import Movable, Move
from ckpt_pass.planner.offload_exact import exact_with_link
from ckpt_pass.planner.problem import Problem
from ckpt_pass.planner.solution import (
    InfeasibleBudgetError,
    Solution,
    evaluate,
    solution_of,
    without_recompute,
)
from ckpt_pass.planner.solve import Pool
from ckpt_pass.planner.solvers import run_solver
from tests.planner.offload_steps import chain, some_step
from tests.planner.test_exact import every_plan

LINKS = [
    Link(0.5, 1.0),
    Link(1.0, 0.5, latency_s=0.5),
    Link(2.0, 4.0),
    Link(4.0, 2.0, latency_s=0.25),
    Link(16.0, 16.0),
]


def every_move(problem: Problem, plan: Solution) -> Iterator[list[Move]]:
    """All sets of moves at all places; those that are issued in one order come back in it."""
    rows, forward = Movable.of(problem, plan.steps), plan.steps.forward
    first = dict(zip(rows.storage.tolist(), rows.first.tolist(), strict=True))
    ways: list[list[Move | None]] = [
        [
            None,
            *(
                Move(storage, forward[released], fetched)
                for released in range(last, len(forward))
                for fetched in range(first[storage] + 1)
            ),
        ]
        for storage, last in zip(rows.storage.tolist(), rows.last.tolist(), strict=True)
    ]
    for chosen in itertools.product(*ways):
        moves = [move for move in chosen if move is not None]
        moves.sort(key=lambda move: (first[move.storage], move.fetched_before))
        places = [move.fetched_before for move in moves]
        if places == sorted(places):
            yield moves


def shortest(problem: Problem, budget_bytes: int, link: Link) -> float | None:
    """The least step time of all plans, or ``None`` if none fits."""
    found = [
        solution.times.step_time_s
        for saved, drops in every_plan(problem)
        for plan in [evaluate(problem, saved, "brute force", drops)]
        for moves in every_move(problem, plan)
        for solution in [solution_of(problem, plan.steps, plan.drops, "", moves, link)]
        if solution.peak_bytes <= budget_bytes and solution.times is not None
    ]
    return min(found, default=None)


def budgets_of(problem: Problem) -> list[int]:
    """Below the least peak without moves, and half-way to the peak without recomputation."""
    least = Pool(problem, ()).least_bytes
    return [least - 1, (least + without_recompute(problem).peak_bytes) // 2]


@pytest.mark.parametrize("seed", range(4))
def test_exact_is_brute_force_over_all_places(seed: int) -> None:
    problem, link = some_step(seed, 3), LINKS[seed % len(LINKS)]
    for budget in budgets_of(problem):
        best = shortest(problem, budget, link)
        if best is None:
            with pytest.raises(InfeasibleBudgetError):
                exact_with_link(problem, budget, link)
            continue
        found = exact_with_link(problem, budget, link)
        assert found.times is not None
        assert found.peak_bytes <= budget
        assert found.times.step_time_s == pytest.approx(best)


@dataclass
class Figures:
    """What comparing solvers with the optimum gave.

    Attributes:
        excess: how much longer the step of ``auto`` is than the shortest, as a share.
        infeasible: cases in which no plan fits.
        moved, mixed: optimal plans that move, and that move and recompute.
        bounds: cases in which the lower bound is above 0.
    """

    excess: list[float]
    infeasible: int = 0
    moved: int = 0
    mixed: int = 0
    bounds: int = 0


def compared(seeds: Iterable[int], most: int) -> Figures:
    """Compare ``auto`` with the optimum on random steps of up to ``most`` values."""
    found = Figures([])
    for seed in seeds:
        problem, link = some_step(seed, most), LINKS[seed % len(LINKS)]
        budget = budgets_of(problem)[seed // len(LINKS) % 2]
        try:
            best = run_solver("exact", problem, budget, link=link)
        except InfeasibleBudgetError:
            with pytest.raises(InfeasibleBudgetError):
                run_solver("auto", problem, budget, link=link)
            found.infeasible += 1
            continue
        except UnsupportedProblemError:
            continue
        auto = run_solver("auto", problem, budget, link=link)
        assert best.times is not None
        assert auto.times is not None
        assert auto.times.step_time_s >= best.times.step_time_s - 1e-9
        assert auto.lower_bound_s <= best.overhead_s + 1e-6
        found.excess.append(auto.times.step_time_s / best.times.step_time_s - 1)
        found.moved += bool(best.moves)
        found.mixed += bool(best.moves) and best.recompute_time_s > 0
        found.bounds += auto.lower_bound_s > 0
    return found


def test_auto_is_within_a_percent_of_the_optimum() -> None:
    found = compared(range(16), 4)
    assert statistics.mean(found.excess) <= 0.01
    assert found.moved >= 3


@pytest.mark.slow
def test_auto_is_within_a_percent_of_the_optimum_on_many() -> None:
    found = compared(range(200), 4)
    print(
        f"{len(found.excess)} cases ({found.infeasible} more are infeasible), "
        f"{found.moved} optima move, {found.mixed} move and recompute; auto is "
        f"{statistics.mean(found.excess):.3%} slower in the mean, {max(found.excess):.2%} at most, "
        f"optimal in {sum(e < 1e-9 for e in found.excess)}; bound above 0 in {found.bounds}"
    )
    assert statistics.mean(found.excess) <= 0.01


def test_what_is_too_large_is_refused() -> None:
    with pytest.raises(UnsupportedProblemError, match=r"tries every plan where there is a link"):
        exact_with_link(chain(16), 50, Link(1.0, 1.0))
