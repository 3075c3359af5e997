"""Joint plans: never slower than each decision alone, within both budgets, one plan each time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from benchmarks.chains import llama_chain, traced
from ckpt_pass.planner.ground import Ground
from ckpt_pass.planner.link import Link
from ckpt_pass.planner.moves import Move
from ckpt_pass.planner.offload_rules import (
    choices,
    everything,
    largest_first,
    layers_but_the_last,
)
from ckpt_pass.planner.problem import Problem
from ckpt_pass.planner.solution import (
    InfeasibleBudgetError,
    Solution,
    evaluate,
    without_recompute,
)
from ckpt_pass.planner.solve import Pool, solve
from ckpt_pass.planner.solvers import (
    NoLinkSolverError,
    WrongSolutionError,
    run_solver,
)
from tests.planner.offload_steps import chain, some_step


@cache
def llama() -> tuple[Problem, tuple[int, ...]]:
    """A narrow Llama of two layers, as the planner gets it."""
    with traced(*llama_chain(2, 2, 32)) as graph:
        return graph.described()


PROBLEMS: dict[str, Callable[[], tuple[Problem, tuple[int, ...]]]] = {
    "chain": lambda: (chain(6), ()),
    "random": lambda: (some_step(3, 8), ()),
    "llama": llama,
}


def time_of(plan: Solution) -> float:
    assert plan.times is not None
    return plan.times.step_time_s


def matched(problem: Problem) -> float:
    """Bytes that may be moved by the time of the forward: a rate of 1."""
    plain = without_recompute(problem)
    ground = Ground(problem, plain, Link(1.0, 1.0))
    return float(ground.rows.nbytes.sum()) / ground.forward_s


@pytest.mark.parametrize("name", PROBLEMS)
def test_joint_is_never_slower_than_each_alone(name: str) -> None:
    problem, borders = PROBLEMS[name]()
    plain, least = without_recompute(problem), Pool(problem, borders).least_bytes
    for rate in (0.1, 1.0, 10.0):
        link = Link(rate * matched(problem), 1.5 * rate * matched(problem))
        for part in (0.0, 0.5) if name != "llama" else (0.3,):
            budget = int(least + part * (plain.peak_bytes - least))
            joint = run_solver("layers", problem, budget, borders, link=link)
            assert joint.peak_bytes <= budget
            others = [run_solver("layers", problem, budget, borders)]
            others = [evaluate(problem, o.saved, "", o.drops, (), link) for o in others]
            ground = Ground(problem, plain, link)
            rules = (largest_first, layers_but_the_last, everything)
            masks = [rule(ground, budget) for rule in rules]
            for mask in (*choices(ground, budget), *masks):
                if mask is not None:
                    others.append(ground.solution(mask, budget, "fixed"))
            for other in others:
                assert other.peak_bytes <= budget
                assert time_of(joint) <= time_of(other) * (1 + 1e-9)


def test_arrays_and_clock_say_the_same() -> None:
    """The search asks arrays; what it takes is what the simulator and the clock say."""
    problem, _ = llama()
    plain = without_recompute(problem)
    link = Link(matched(problem), 2 * matched(problem), 1e-6)
    ground = Ground(problem, plain, link)
    everything_away = np.ones(len(ground.rows), dtype=bool)
    moves = ground.rows.tightest(plain.steps)
    tight = evaluate(problem, plain.saved, moves=moves)
    assert ground.least_bytes == tight.peak_bytes
    for budget in (tight.peak_bytes, (tight.peak_bytes + plain.peak_bytes) // 2):
        for mask in (everything_away, *choices(ground, budget)):
            found = ground.solution(mask, budget, "")
            assert found.peak_bytes <= budget
            assert time_of(found) == pytest.approx(ground.step_time_s(mask, budget))
    assert ground.step_time_s(everything_away, tight.peak_bytes - 1) == float("inf")


@pytest.mark.parametrize("seed", range(3))
def test_lower_peaks_than_without(seed: int) -> None:
    problem = some_step(seed, 7)
    link = Link(matched(problem), matched(problem))
    least = Pool(problem, ()).least_bytes
    with pytest.raises(InfeasibleBudgetError) as caught:
        run_solver("layers", problem, 1, link=link)
    lower = caught.value.least_feasible_bytes
    assert lower <= least
    found = run_solver("layers", problem, lower, link=link)
    assert found.peak_bytes <= lower
    assert found.moves or lower == least


def test_what_cannot_run_again_need_not_lie_on_the_device() -> None:
    """Six values of 10 bytes that must be saved: two of them, while one is made of the other."""
    problem = chain(6)
    ops = (replace(op, must_save=op.savable) for op in problem.ops)
    problem = replace(problem, ops=tuple(ops))
    for link, least in ((None, 63), (Link(1.0, 1.0), 20)):
        with pytest.raises(InfeasibleBudgetError) as caught:
            run_solver("layers", problem, 1, link=link)
        assert caught.value.least_feasible_bytes == least


def test_the_other_sides_limit_is_kept() -> None:
    problem, borders = llama()
    budget = int(0.75 * without_recompute(problem).peak_bytes)
    free = run_solver("layers", problem, budget, borders, link=Link(1e12, 1e12))
    assert free.times is not None
    limit = free.times.host_peak_bytes // 2
    found = run_solver("layers", problem, budget, borders, link=Link(1e12, 1e12, host_bytes=limit))
    assert found.times is not None
    assert 0 < found.times.host_peak_bytes <= limit
    none = run_solver("layers", problem, budget, borders, link=Link(1e12, 1e12, host_bytes=0))
    assert none.moves == ()
    assert none.recompute_time_s > 0 == free.recompute_time_s


def test_one_plan_each_time() -> None:
    problem, borders = llama()
    budget = int(0.75 * without_recompute(problem).peak_bytes)
    link = Link(matched(problem) / 3, matched(problem) / 3)
    first = run_solver("auto", problem, budget, borders, link=link)
    again = run_solver("auto", replace(problem), budget, borders, link=link)
    assert first == again
    assert 0.0 <= first.lower_bound_s <= first.overhead_s


def test_without_a_link_nothing_changes() -> None:
    problem, borders = llama()
    budget = int(0.75 * without_recompute(problem).peak_bytes)
    found = run_solver("layers", problem, budget, borders)
    assert (found.moves, found.times) == ((), None)
    assert found == solve(problem, budget, borders)


def test_what_must_not_move_stays() -> None:
    problem = chain(8)
    with_all = run_solver("layers", problem, 60, link=Link(1e3, 1e3))
    assert with_all.recompute_time_s == 0.0
    moved = with_all.moves[0].storage
    held = replace(problem, immovable=(moved,))
    found = run_solver("layers", held, 60, link=Link(1e3, 1e3))
    assert moved not in {move.storage for move in found.moves}


@pytest.mark.parametrize("name", ["layers", "exact"])
def test_what_must_move_does_where_it_is_saved(name: str) -> None:
    problem = replace(chain(), must_move=(2,))
    for budget in (24, 33, 43):
        found = run_solver(name, problem, budget, link=Link(0.1, 0.1))
        assert (2 in found.saved) == (2 in {move.storage for move in found.moves})
    bound = replace(problem.ops[2], must_save=True)
    ops = (*problem.ops[:2], bound, *problem.ops[3:])
    found = run_solver(name, replace(problem, ops=ops), 43, link=Link(0.1, 0.1))
    assert [move.storage for move in found.moves] == [2]
    with pytest.raises(WrongSolutionError, match="leaves storage 2 where it is"):
        run_solver(staying, replace(problem, ops=ops), 100, link=Link(1.0, 1.0))


def staying(problem: Problem, budget_bytes: int, link: Link) -> Solution:
    return evaluate(problem, range(4), "own", (), (), link)


def test_solvers_that_know_no_link_are_refused() -> None:
    problem, link = chain(), Link(1.0, 1.0)
    with pytest.raises(NoLinkSolverError, match=r"'uniform-cut' knows nothing of moving values"):
        run_solver("uniform-cut", problem, 40, link=link)
    with pytest.raises(NoLinkSolverError, match="'plain' knows nothing"):
        run_solver(plain, problem, 100, link=link)
    seen = []

    def moving(problem: Problem, budget_bytes: int, link: Link | None = None) -> Solution:
        seen.append(link)
        return evaluate(problem, range(4), "own", (), [Move(0, 1, 3)] if link else (), link)

    assert run_solver(moving, problem, 100, link=link).moves == (Move(0, 1, 3),)
    assert run_solver(moving, problem, 100).moves == ()
    assert seen == [link, None]


def plain(problem: Problem, budget_bytes: int) -> Solution:
    return without_recompute(problem)


@pytest.mark.parametrize(
    ("moves", "link", "message"),
    [
        ([Move(0, 1, 3)], None, "a plan with moves, and there is no link"),
        ([Move(0, 0, 3)], Link(1.0, 1.0), r"cannot run\. Storage 0 \(f0\) is released after op 0"),
        ([Move(0, 1, 3)], Link(1.0, 1.0, host_bytes=9), "moves 10 bytes at a time, expected at"),
    ],
)
def test_wrong_moves_are_caught(moves: list[Move], link: Link | None, message: str) -> None:
    def wrong(problem: Problem, budget_bytes: int, **rest: Any) -> Solution:
        return replace(evaluate(problem, range(4), "wrong"), moves=tuple(moves))

    with pytest.raises(WrongSolutionError, match=message):
        run_solver(wrong, chain(), 100, link=link)
