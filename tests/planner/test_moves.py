"""Moves on problems written by hand: bytes over time, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings

from ckpt_pass.planner.liveness import simulate
from ckpt_pass.planner.moves import InvalidMoveError, Movable, Move, check_moves, in_problem
from ckpt_pass.planner.problem import Problem, with_waiting
from ckpt_pass.planner.schedule import schedule
from ckpt_pass.planner.solution import evaluate, without_recompute
from tests.planner.offload_steps import chain
from tests.planner.test_exact import steps


def test_device_memory_is_free_from_release_to_fetch() -> None:
    problem = chain()
    kept = evaluate(problem, range(4))
    assert kept.profile.bytes_at == (10, 20, 30, 40, 41, 43, 34, 24, 14)
    # f0 is read by f1 (place 1) and by b0 (place 3 of the backward).
    for released, fetched, expected in (
        (1, 3, (10, 20, 20, 30, 31, 33, 24, 14, 14)),
        (3, 1, (10, 20, 30, 40, 31, 33, 34, 24, 14)),
        (4, 0, (10, 20, 30, 40, 41, 43, 34, 24, 14)),
    ):
        moved = evaluate(problem, range(4), moves=[Move(0, released, fetched)])
        assert moved.profile.bytes_at == expected
        assert moved.steps == kept.steps
        assert moved.profile.saved_bytes == kept.profile.saved_bytes - 10


def test_what_may_move() -> None:
    problem = chain()
    plan = evaluate(problem, range(4))
    known = Movable.of(problem, plan.steps)
    assert known.storage.tolist() == [0, 1, 2, 3]
    assert known.made.tolist() == [0, 1, 2, 3]
    assert known.last.tolist() == [1, 2, 3, 4]
    assert known.first.tolist() == [3, 2, 1, 0]
    for change, left in (
        ({"forward_outputs": (4, 2)}, [0, 1, 3]),
        ({"immovable": (0, 3)}, [1, 2]),
        ({"output_storages": (1, 8)}, [0, 2, 3]),
        ({"storage_bytes": (0, *problem.storage_bytes[1:])}, [1, 2, 3]),
    ):
        other = replace(problem, **change)
        found = Movable.of(other, schedule(other, range(4)))
        assert found.storage.tolist() == left
    assert Movable.of(problem, schedule(problem, {1})).storage.tolist() == [1]


@pytest.mark.parametrize(
    ("moves", "message"),
    [
        ([Move(4, 4, 0)], r"Storage 4 \(loss\) cannot be moved"),
        ([Move(77, 4, 0)], "Storage 77 cannot be moved"),
        ([Move(0, 0, 3)], r"Storage 0 \(f0\) is released after op 0, expected op 1"),
        ([Move(0, 7, 3)], "is released after op 7"),
        ([Move(0, 1, 4)], r"is fetched before place 4 of the backward, expected 0 to 3"),
        ([Move(0, 1, -1)], "is fetched before place -1"),
        ([Move(0, 1, 3), Move(0, 2, 3)], "is moved twice"),
    ],
)
def test_what_cannot_be_carried_out_is_refused(moves: list[Move], message: str) -> None:
    problem = chain()
    with pytest.raises(InvalidMoveError, match=message):
        evaluate(problem, range(4), moves=moves)


def test_a_recomputed_value_does_not_move() -> None:
    problem = chain()
    steps_of = schedule(problem, {0, 1, 3})
    with pytest.raises(InvalidMoveError, match=r"Storage 2 \(f2\) cannot be moved"):
        check_moves(problem, steps_of, [Move(2, 3, 0)])


def test_moves_of_a_problem_in_which_others_wait() -> None:
    problem = chain()
    larger = with_waiting(problem, 5)
    moves = [Move(0, 1, 3), Move(1, len(problem.ops), 0)]
    assert max(evaluate(larger, range(4), moves=moves).profile.bytes_at) == 36
    plan = evaluate(problem, range(4))
    inside = in_problem(moves, plan.steps, len(problem.ops))
    assert inside == (Move(0, 1, 3), Move(1, 4, 0))
    assert evaluate(problem, range(4), moves=inside).moves == inside


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=steps())
def test_moves_take_their_bytes_away_and_nothing_else(problem: Problem) -> None:
    """Whatever the step: between release and fetch, to the byte; without moves as ever."""
    plan = without_recompute(problem)
    assert simulate(problem, plan.steps, ()) == plan.profile
    known = Movable.of(problem, plan.steps)
    moves = known.tightest(plan.steps)
    check_moves(problem, plan.steps, moves)
    length = len(plan.steps.forward)
    expected = list(plan.profile.bytes_at)
    for nbytes, last, first in zip(known.nbytes, known.last, known.first, strict=True):
        for place in range(last + 1, length + first):
            expected[place] -= int(nbytes)
    found = simulate(problem, plan.steps, moves)
    assert list(found.bytes_at) == expected
    assert min(found.bytes_at, default=0) >= 0
