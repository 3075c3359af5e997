"""What is alive when adds up to the simulator's bytes, whatever a step saves, drops and moves."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_pass.planner.alive import (
    BACKWARD,
    GRADIENT,
    MOVED,
    OUTPUT,
    RECOMPUTED,
    SAVED,
    Life,
    alive_in,
)
from ckpt_pass.planner.moves import Movable, Move
from ckpt_pass.planner.problem import Problem
from ckpt_pass.planner.solution import Solution, evaluate
from tests.planner.offload_steps import chain
from tests.planner.test_exact import every_plan, steps


def bytes_of(lives: tuple[Life, ...], length: int) -> tuple[int, ...]:
    change = [0] * (length + 1)
    for life in lives:
        change[life.first] += life.nbytes
        change[life.last + 1] -= life.nbytes
    return tuple(accumulate(change[:-1]))


def lives_of(problem: Problem, plan: Solution) -> tuple[Life, ...]:
    found = alive_in(problem, plan.steps, plan.moves)
    assert bytes_of(found, len(plan.profile.bytes_at)) == plan.profile.bytes_at
    assert all(life.nbytes > 0 and 0 <= life.first <= life.last for life in found)
    return found


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=steps(), seed=st.integers(0, 1 << 16))
def test_lives_add_up(problem: Problem, seed: int) -> None:
    plans = list(every_plan(problem))
    for number in np.random.default_rng(seed).integers(0, len(plans), size=4):
        saved, drops = plans[number]
        plan = evaluate(problem, saved, drops=drops)
        lives_of(problem, plan)
        moves = Movable.of(problem, plan.steps).tightest(plan.steps)
        lives_of(problem, evaluate(problem, saved, drops=drops, moves=moves))


def test_what_each_life_is_there_for() -> None:
    """Four forward values of 10 bytes each, a loss, and their backward."""
    problem = chain()
    plain = lives_of(problem, evaluate(problem, range(4)))
    assert [(life.maker, life.kind) for life in plain[:5]] == [
        *((op, SAVED) for op in range(4)),
        (4, OUTPUT),
    ]
    assert {life.kind for life in plain[5:]} == {GRADIENT, BACKWARD}
    again = lives_of(problem, evaluate(problem, (0, 1, 3)))
    twice = [life for life in again if life.maker == 2]
    assert [life.kind for life in twice] == [RECOMPUTED, RECOMPUTED]
    assert twice[0].last < 5 <= twice[1].first  # five ops are the forward
    moved = lives_of(problem, evaluate(problem, range(4), moves=[Move(0, 1, 3)]))
    away = [(life.first, life.last, life.kind) for life in moved if life.maker == 0]
    assert away == [(0, 1, MOVED), (8, 8, MOVED)]
