"""The registry of solvers: names, what users may pass, and that every answer is checked."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from typing import cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_pass.planner.built_in import NumberedCut
from ckpt_pass.planner.exact import broken_rule, solve_exact
from ckpt_pass.planner.problem import Op, Problem
from ckpt_pass.planner.solution import (
    InfeasibleBudgetError,
    Solution,
    cheapest_first,
    evaluate,
    without_recompute,
)
from ckpt_pass.planner.solve import solve
from ckpt_pass.planner.solvers import (
    SOLVERS,
    Auto,
    InvalidTimeLimitError,
    Solver,
    UnknownSolverError,
    WrongSolutionError,
    as_solver,
    run_solver,
    solver_names,
)
from tests.planner.test_exact import steps


def chain(length: int = 4, nbytes: int = 8) -> Problem:
    """Ops in a row, each read by the next and by its own backward; even ones take long."""
    ops: list[Op] = []
    for i in range(length):
        inputs = (i - 1,) if i else ()
        ops.append(
            Op(f"f{i}", inputs, (i,), (i,), (i, *inputs), True, time_s=5.0 if i % 2 else 1.0,
               savable=True)
        )  # fmt: skip
    tangent = 2 * length
    for i in reversed(range(length)):
        previous = (len(ops) - 1,) if len(ops) > length else ()
        made = 2 * length - 1 - i
        reads = (made, i, made - 1 if previous else tangent)
        ops.append(Op(f"b{i}", (i, *previous), (made,), (made,), reads, False, late=True))
    return Problem(
        ops=tuple(ops),
        storage_bytes=(*([nbytes] * length), *([1] * length), 1),
        forward_outputs=(length - 1,),
        forward_roots=(length - 1,),
        backward_outputs=(len(ops) - 1,),
        output_storages=(2 * length - 1,),
        given=(tangent,),
    )


def test_every_name_is_a_solver_that_keeps_to_the_budget() -> None:
    problem = chain()
    plain = without_recompute(problem).peak_bytes
    assert solver_names() == ("auto", "layers", "exact", "uniform-cut")
    for name in solver_names():
        solver = as_solver(name)
        assert solver.name == name
        assert SOLVERS[name] is solver is as_solver(solver)
        assert run_solver(name, problem, plain).recompute_time_s == 0.0
        found = run_solver(name, problem, plain - 1)
        assert found.peak_bytes < plain
        assert 0.0 <= found.lower_bound_s <= found.recompute_time_s
        with pytest.raises(InfeasibleBudgetError) as caught:
            run_solver(name, problem, 1)
        assert run_solver(name, problem, caught.value.least_feasible_bytes)


def test_cuts_by_number_go_from_the_fastest_to_the_last() -> None:
    problem = chain()
    cuts = []
    with pytest.raises(InfeasibleBudgetError):
        for number in itertools.count():
            cuts.append(run_solver(NumberedCut(number), problem, 1 << 40))
    assert len({cut.saved for cut in cuts}) == len(cuts) > 1
    assert cuts[0].recompute_time_s == 0.0
    assert cuts == sorted(cuts, key=cheapest_first)
    best = run_solver("uniform-cut", problem, cuts[-1].peak_bytes)
    assert run_solver(NumberedCut(0), problem, cuts[-1].peak_bytes).saved == best.saved


@pytest.mark.parametrize("name", ["auto", "layers", "exact", "uniform-cut"])
def test_solvers_are_values(name: str) -> None:
    solver = SOLVERS[name]
    assert pickle.loads(pickle.dumps(solver)) == solver
    assert hash(solver) == hash(pickle.loads(pickle.dumps(solver)))
    assert repr(solver).startswith(type(solver).__name__)
    with pytest.raises((FrozenInstanceError, AttributeError, TypeError)):
        setattr(solver, "name", "other")  # noqa: B010


def test_an_unknown_name_says_the_nearest() -> None:
    with pytest.raises(UnknownSolverError, match=r"'exakt'\. Did you mean 'exact'\?.*uniform-cut"):
        as_solver("exakt")


@pytest.mark.parametrize("wrong", [3, None, ["exact"], Auto])
def test_what_is_no_solver(wrong: object) -> None:
    with pytest.raises(UnknownSolverError, match="expected the name of a solver"):
        as_solver(cast("Solver", wrong))


@pytest.mark.parametrize("wrong", [0, -1, -0.5, float("nan"), float("inf"), True, "5"])
def test_a_time_limit_is_a_positive_number(wrong: float) -> None:
    with pytest.raises(InvalidTimeLimitError, match=r"time_limit_s=.*Give 5 for five seconds"):
        run_solver("layers", chain(), 100, time_limit_s=wrong)


def test_a_callable_gets_what_it_takes() -> None:
    problem, seen = chain(), []

    def short(problem: Problem, budget_bytes: int) -> Solution:
        return solve(problem, budget_bytes)

    def full(problem: Problem, budget_bytes: int, **rest: object) -> Solution:
        seen.append(rest)
        return solve(problem, budget_bytes)

    for function in (short, full):
        assert as_solver(function).name == function.__name__
        assert run_solver(function, problem, 100, (1,), 2.0).peak_bytes <= 100
    assert seen == [{"borders": (1,), "time_limit_s": 2.0}]


def lying(change: Callable[[Problem, Solution], object]) -> Callable[[Problem, int], Solution]:
    def liar(problem: Problem, budget_bytes: int) -> Solution:
        return cast("Solution", change(problem, without_recompute(problem)))

    return liar


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda problem, plan: {1, 2}, r"'liar' returned \{1, 2\}, expected a Solution"),
        (
            lambda problem, plan: replace(plan, profile=solve(problem, 30).profile),
            r"peaks at 35 bytes, expected at most 30",
        ),
        (
            lambda problem, plan: replace(plan, steps=replace(plan.steps, saved=frozenset({99}))),
            "names op 99, expected",
        ),
        (lambda problem, plan: replace(plan, drops=frozenset({(5, 77)})), "names op 77, expected"),
        (lambda problem, plan: evaluate(problem, {5}), r"saves op 5 \(b2\), whose result cannot"),
        (
            lambda problem, plan: replace(solve(problem, 30), lower_bound_s=99.0),
            r"lower bound of 99\.0 s above its own plan's",
        ),
    ],
)
def test_wrong_solutions_are_caught(
    change: Callable[[Problem, Solution], object], message: str
) -> None:
    """Claimed peaks count for nothing: the plan that is over the budget says it is not."""
    with pytest.raises(WrongSolutionError, match=message):
        run_solver(lying(change), chain(), 30)


def test_what_must_be_saved_is_not_recomputed_by_anybodys_plan() -> None:
    problem = chain()
    bound = replace(problem.ops[1], must_save=True)
    problem = replace(problem, ops=(problem.ops[0], bound, *problem.ops[2:]))
    assert broken_rule(problem, evaluate(problem, {0, 2})) is not None
    with pytest.raises(WrongSolutionError, match=r"runs op 1 \(f1\) again"):
        run_solver(lambda problem, budget_bytes: evaluate(problem, {0, 2}), problem, 100)
    assert 1 in run_solver("exact", problem, 100).saved


def test_auto_says_what_it_chose_and_why() -> None:
    problem = chain(6)
    budget = without_recompute(problem).peak_bytes - 9
    small, large = Auto(), Auto(size=0)
    assert "choices are too many" in large(problem, budget).solver
    assert (
        "exact solver" in small(problem, budget).solver or "proves" in small(problem, budget).solver
    )
    assert small(problem, budget).status == "optimal"


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=steps(), part=st.integers(0, 4))
def test_auto_is_exact_where_the_step_is_small_and_gives_one_plan(
    problem: Problem, part: int
) -> None:
    try:
        least = run_solver("exact", problem, 1).peak_bytes
    except InfeasibleBudgetError as error:
        least = error.least_feasible_bytes
    most = max(least, without_recompute(problem).peak_bytes)
    budget = least + part * (most - least) // 4
    exact, auto = solve_exact(problem, budget), run_solver("auto", problem, budget)
    assert auto.recompute_time_s == pytest.approx(exact.recompute_time_s)
    again = run_solver("auto", replace(problem), budget)
    assert (again.saved, again.drops, again.solver) == (auto.saved, auto.drops, auto.solver)
    for name in ("layers", "uniform-cut"):
        try:
            found = run_solver(name, problem, budget)
        except InfeasibleBudgetError:
            continue
        assert found.recompute_time_s >= exact.recompute_time_s - 1e-9
        assert found.lower_bound_s <= exact.recompute_time_s * (1 + 1e-6)
