"""Least peaks of a deep chain: recomputing each value once at most, and again and again.

With one saved value a layer the peak grows with the number of layers; only values that are dropped
and computed once more (nested checkpoints) go below that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from benchmarks.chains import llama_chain, traced
from benchmarks.common import Bar, DeepRow, Result, torch_threads
from ckpt_pass.planner.problem import Problem
from ckpt_pass.planner.solution import Solution, evaluate, step_time, without_recompute
from ckpt_pass.planner.solve import Pool

LAYERS = 64
BATCH, LENGTH = 8, 256
PLAIN = "nothing"
BORDERS = "all but the layers' borders, once"
ONCE = "once at most, least peak"
OFTEN = "again and again, least peak"


def run(layers: int = LAYERS, batch: int = BATCH, length: int = LENGTH) -> Result:
    """Plan a chain of so many layers in each way; nothing is run.

    Args:
        layers: of the chain.
        batch, length: of its input.
    """
    with torch_threads(1), traced(*llama_chain(layers, batch, length)) as graph:
        problem, borders = graph.described()
    found = ways(problem, borders)
    model = f"narrow Llama, {layers} layers"
    rows = tuple(_row(model, way, problem, plan) for way, plan in found.items())
    ratio = found[OFTEN].peak_bytes / found[ONCE].peak_bytes
    return Result(
        name="deep",
        title=f"least peaks: {model}, B {batch}, T {length}, {len(problem.ops):,} ops",
        rows=rows,
        bars=(Bar("least peak, recomputing again and again / once at most", ratio, 1.0),),
    )


def ways(problem: Problem, borders: Collection[int]) -> dict[str, Solution]:
    """The plan of each way."""
    plans = Pool(problem, borders).plans.values()
    # Dropping is what makes a value run a second time in the backward.
    once = [plan for plan in plans if not plan.drops]
    return {
        PLAIN: without_recompute(problem),
        BORDERS: evaluate(problem, borders),
        ONCE: min(once, key=lambda plan: plan.peak_bytes),
        OFTEN: min(plans, key=lambda plan: plan.peak_bytes),
    }


def _row(model: str, way: str, problem: Problem, plan: Solution) -> DeepRow:
    # Views make nothing, and cost nothing to make again.
    runs = Counter(i for i in plan.steps.backward if problem.ops[i].makes)
    return DeepRow(
        model=model,
        way=way,
        peak_bytes=plan.peak_bytes,
        recompute_share=plan.recompute_time_s / step_time(problem),
        saved=len(plan.saved),
        repeated=sum(count > 1 for count in runs.values()),
        most_runs=max(runs.values()),
    )
