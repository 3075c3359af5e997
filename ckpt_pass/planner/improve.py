"""Local search: spend what a plan leaves of its budget.

A plan from the pool seldom fills its budget. Each round looks at the recomputed values and at the
drops, the most recompute time for each byte first, and saves the value, or keeps it, where the
simulator says that the step still fits and is faster.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from ckpt_pass.planner.problem import Problem
from ckpt_pass.planner.schedule import Drop
from ckpt_pass.planner.solution import Solution, cheapest_first, evaluate


def improved(problem: Problem, plan: Solution, budget_bytes: int, evaluations: int) -> Solution:
    """A plan within the budget that is no slower than ``plan``.

    Args:
        problem: the step.
        plan: a plan within the budget.
        budget_bytes: the peak to stay within.
        evaluations: how many plans may be simulated.
    """
    best, left = plan, evaluations
    while left > 0:
        start = best
        for saved, drops in _moves(problem, start):
            if left <= 0:
                break
            # What was accepted before in this round stays.
            found = _tried(problem, best, saved, drops)
            left -= 1
            if found.peak_bytes <= budget_bytes and cheapest_first(found) < cheapest_first(best):
                best = found
        if best is start:
            break
    return best if best is plan else replace(best, solver=f"{plan.solver}, improved")


def _tried(
    problem: Problem, best: Solution, save: frozenset[int], keep: frozenset[Drop]
) -> Solution:
    return evaluate(problem, best.saved | save, best.solver, best.drops - keep)


def _moves(problem: Problem, plan: Solution) -> Iterator[tuple[frozenset[int], frozenset[Drop]]]:
    """What to save or to keep instead, the most promising first."""
    runs = Counter(plan.steps.backward)
    priced: list[tuple[float, int, frozenset[int], frozenset[Drop]]] = []
    nothing: frozenset[Drop] = frozenset()
    for index, times in runs.items():
        op = problem.ops[index]
        if not op.forward or not op.savable or op.must_recompute:
            continue
        nbytes = sum(problem.storage_bytes[s] for s in op.holds)
        chain = _time_to_make(problem, runs, index) * times
        if chain > 0:
            priced.append((-chain / max(nbytes, 1), index, frozenset({index}), nothing))
    for drop in plan.drops:
        op = problem.ops[drop[1]]
        if runs[drop[1]] > 1 and op.time_s > 0:
            nbytes = sum(problem.storage_bytes[s] for s in op.makes)
            gain = op.time_s / max(nbytes, 1)
            priced.append((-gain, drop[1], frozenset(), frozenset({drop})))
    for _, _, save, keep in sorted(priced, key=lambda m: (m[0], m[1], sorted(m[3]))):
        yield save, keep


def _time_to_make(problem: Problem, runs: Counter[int], index: int) -> float:
    """Seconds of a recomputed op, and of those that run for it alone."""
    total, stack, seen = 0.0, [index], {index}
    while stack:
        current = stack.pop()
        total += problem.ops[current].time_s
        for source in problem.ops[current].inputs:
            alone = all(user in seen or user not in runs for user in problem.users[source])
            if alone and source in runs and source not in seen:
                seen.add(source)
                stack.append(source)
    return total
