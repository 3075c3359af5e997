"""Values that fused kernels compute where they are read."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from ckpt_pass.planner.inlined import Inlinable, with_inlined
from ckpt_pass.planner.liveness import simulate
from ckpt_pass.planner.problem import Op, Problem
from ckpt_pass.planner.schedule import schedule
from ckpt_pass.planner.solution import InfeasibleBudgetError
from ckpt_pass.planner.solvers import run_solver
from tests.planner.offload_steps import some_step


def made(
    name: str, inputs: tuple[int, ...], storage: int, reads: tuple[int, ...], forward: bool = True
) -> Op:
    return Op(
        name, inputs, (storage,), (storage,), (storage, *reads), forward, late=not forward,
        savable=forward, time_s=1.0,
    )  # fmt: skip


def head(scaled_bytes: int = 100) -> Problem:
    """Logits, what is made of them element by element, a loss, and the gradient of the logits."""
    ops = (
        made("logits", (), 0, ()),
        made("scaled", (0,), 1, (0,)),
        made("loss", (1,), 2, (1,)),
        made("gradient", (1,), 3, (1, 5), forward=False),
        made("weights", (3,), 4, (3,), forward=False),
    )
    sizes = (100, scaled_bytes, 1, 100, 10, 1)
    return Problem(ops, sizes, (2,), (2,), (4,), (4,), given=(5,))


def inlined(problem: Problem, candidates: dict[int, Inlinable]) -> Problem:
    return replace(problem, ops=with_inlined(problem.ops, problem.storage_bytes, candidates))


def peak(problem: Problem, *saved: int) -> int:
    return simulate(problem, schedule(problem, saved)).peak_bytes


def test_what_reads_it_holds_what_it_is_made_from() -> None:
    # Written: what is made of the logits and their gradient; where the logits stay, in between.
    assert peak(head(), 1) == 202 and peak(head(), 0) == 202
    fused = inlined(head(), {1: Inlinable(readers=2)})
    assert fused.ops[1].makes == () and not fused.ops[1].savable
    assert fused.ops[3].touches == (3, 0, 5)
    assert peak(fused, 0) == 202  # the logits and their gradient


@pytest.mark.parametrize(
    ("scaled_bytes", "candidate"),
    [
        (50, Inlinable(2)),  # to save it is to save half of the logits
        (100, Inlinable(2, heavy=True)),  # it is not computed twice
    ],
)
def test_what_is_written_all_the_same(scaled_bytes: int, candidate: Inlinable) -> None:
    assert inlined(head(scaled_bytes), {1: candidate}) == head(scaled_bytes)


def test_a_chain_with_something_heavy_in_it_is_computed_once() -> None:
    steps = {1: Inlinable(1, heavy=True)}
    assert inlined(head(), steps).ops[1].makes == ()
    # The gradient reads what is heavy itself where it is computed again for several readers.
    assert inlined(head(), {**steps, 3: Inlinable(2)}).ops[3].makes == (3,)
    assert inlined(head(), {**steps, 3: Inlinable(1)}).ops[3].makes == ()


def test_a_value_made_from_many_is_written() -> None:
    sources = tuple(made(f"x{i}", (), i, ()) for i in range(9))
    total = made("sum", tuple(range(9)), 9, tuple(range(9)), forward=False)
    last = made("last", (9,), 10, (9,), forward=False)
    problem = Problem((*sources, total, last), (1,) * 11, (), (), (10,), (10,))
    assert inlined(problem, {9: Inlinable(1)}) == problem


@pytest.mark.parametrize("seed", range(40))
def test_plans_of_random_steps_keep_to_their_budgets_and_bounds(seed: int) -> None:
    """``run_solver`` refuses a plan over the budget, and a bound above its time."""
    draw, problem = random.Random(seed), some_step(seed, most=6)
    ends = {*problem.forward_roots, *problem.backward_outputs}
    candidates = {
        index: Inlinable(len(problem.users[index]))
        for index in range(len(problem.ops))
        if index not in ends and draw.random() < 0.5
    }
    fused = inlined(problem, candidates)
    for solver in ("auto", "layers", "exact"):
        with pytest.raises(InfeasibleBudgetError) as caught:
            run_solver(solver, fused, 0)
        least = caught.value.least_feasible_bytes
        for budget in (least, least + 3, 2 * least):
            found = run_solver(solver, fused, budget)
            assert found.peak_bytes <= budget
