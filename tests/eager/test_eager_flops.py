"""Eager plans recompute no more flops than torch's selective checkpointing at the same peak."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache

import pytest

import ckpt_pass
from benchmarks.eager_budgets import LARGE, LISTS, SMALL, Model, measured, modelled, subsets
from ckpt_pass.eager.planning import described
from ckpt_pass.eager.trace import trace_step
from ckpt_pass.ops.taxonomy import op_name
from ckpt_pass.planner.eager_parts import EagerPlan
from ckpt_pass.planner.eager_problem import EagerProblem
from ckpt_pass.planner.eager_solve import EagerPool

MODELS = {model.name: model for model in (*SMALL, *LARGE)}
quick_on_gpt2 = pytest.mark.parametrize(
    "name",
    [n if n == "gpt2" else pytest.param(n, marks=pytest.mark.slow) for n in MODELS],
)


def problem_of(model: Model) -> tuple[EagerProblem, list[str]]:
    step, args = model.make()
    return described(trace_step(step, args, None)), model.blocks(step)


def op_lists(model: Model, count: int) -> Iterator[list[object]]:
    """Every subset of the usual lists, and random lists of the ops in the blocks."""
    for names in subsets():
        yield [op for name in names for op in LISTS[name]]
    step, args = model.make()
    trace = trace_step(step, args, None)
    targets = {op.call.target for op in trace.ops[: trace.forward_length] if op.makes}
    ops = sorted(targets, key=lambda op: op_name(op) if callable(op) else str(op))
    draw = random.Random(0)
    for _ in range(count):
        yield draw.sample(ops, draw.randint(1, len(ops)))


@quick_on_gpt2
def test_no_op_list_recomputes_less_at_its_simulated_peak(name: str) -> None:
    model = MODELS[name]
    problem, blocks = problem_of(model)
    frontier = EagerPool(problem).frontier()
    flops = cache(lambda plan: problem.simulate(plan).recompute_flops)
    theirs = {modelled(problem, blocks, ops) for ops in op_lists(model, 60)}
    assert len(theirs) > 10
    for plan in theirs:
        again = problem.simulate(plan)
        time_s, _, ours = next(entry for entry in frontier if entry[1] <= again.peak_bytes)
        assert flops(ours) <= again.recompute_flops
        assert time_s <= again.recompute_time_s


@quick_on_gpt2
def test_no_more_flops_at_the_measured_peak_of_an_op_list(name: str) -> None:
    model = MODELS[name]
    peak_bytes, flops = measured(model.make, model.blocks, LISTS["matmuls"])
    step, args = model.make()
    plan = ckpt_pass.plan(step, *args, budget=peak_bytes, mode="eager")
    with plan.applied(step):
        ours = ckpt_pass.measure_step(lambda: step(*args), warmup=0, repeats=1)
    assert ours.peak_bytes <= peak_bytes
    assert ours.flops <= flops


def test_looking_for_what_is_kept_is_a_small_part_of_a_modelled_step() -> None:
    """On tiny models Python's time would outweigh every flop; in timed steps it counts in full."""
    problem, _ = problem_of(MODELS["gpt2"])
    looked_at = problem.keeping_s * problem.forward_length
    assert 0 < looked_at <= 0.01 * problem.step_time_s * (1 + 1e-9)
    step, args = MODELS["gpt2"].make()
    timed = described(trace_step(step, args, None), times=True)
    assert timed.keeping_s > problem.keeping_s


def test_mixing_reaches_below_the_straight_line_between_uniform_plans() -> None:
    """Where only some layers must give way, what they cost is their share of what all would."""
    problem, blocks = problem_of(MODELS["gpt2"])
    frontier = EagerPool(problem).frontier()
    everywhere = problem.simulate(modelled(problem, blocks, []))
    plain = problem.simulate(EagerPlan())
    for part in (0.25, 0.5, 0.75):
        peak = plain.peak_bytes - part * (plain.peak_bytes - everywhere.peak_bytes)
        time_s = next(entry[0] for entry in frontier if entry[1] <= peak)
        assert time_s <= part * everywhere.recompute_time_s
