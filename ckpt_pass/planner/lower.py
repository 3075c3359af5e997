"""Lower the peak of a whole plan, whatever the recompute time: how far down a step can go.

Each step looks at the moment of the peak. What is saved and idle there is computed again instead;
what was computed again and is idle is dropped; what is being computed again is saved. The move that
costs the least time for the bytes that it takes off the peak is made, until none helps.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from ckpt_pass.planner.liveness import backward_lives
from ckpt_pass.planner.problem import Problem
from ckpt_pass.planner.schedule import Drop, anchor_order
from ckpt_pass.planner.solution import Solution, evaluate
from ckpt_pass.planner.squeeze import idle_drops

_Plan = tuple[frozenset[int], frozenset[Drop]]


def lowered(problem: Problem, plan: Solution, evaluations: int) -> list[Solution]:
    """Plans with ever lower peaks.

    Args:
        problem: the step.
        plan: where to begin.
        evaluations: how many plans may be simulated.
    """
    found: list[Solution] = []
    current = plan
    while evaluations > 0:
        best, best_price = None, float("inf")
        for saved, drops in _moves(problem, current):
            if evaluations <= 0:
                break
            evaluations -= 1
            tried = evaluate(problem, saved | problem.bound, "lowered peak", drops)
            if _height(tried) >= _height(current):
                continue
            freed = current.peak_bytes - tried.peak_bytes or 1
            price = (tried.recompute_time_s - current.recompute_time_s) / freed
            if price < best_price:
                best, best_price = tried, price
        if best is None:
            break
        current = best
        found.append(best)
    return found


def _height(plan: Solution) -> tuple[int, int]:
    return plan.peak_bytes, plan.profile.bytes_at.count(plan.peak_bytes)


def _moves(problem: Problem, plan: Solution) -> Iterator[_Plan]:
    """Saved sets and drops in which something that lies at the peak does not."""
    peak, length = plan.profile.peak_index, plan.profile.forward_length
    at = problem.ops[plan.profile.schedule[peak]]
    for index in sorted(plan.saved):
        op = problem.ops[index]
        idle = not set(op.holds).intersection(at.touches)
        if idle and not op.must_save and any(problem.storage_bytes[s] for s in op.holds):
            yield plan.saved - {index}, plan.drops
    if peak < length:
        return
    anchors, order = set(anchor_order(problem)), plan.steps.backward
    alive = backward_lives(problem, plan.steps)
    for drops in idle_drops(problem, order, alive, peak - length, anchors):
        yield plan.saved, plan.drops | drops
    for index in _made_around(problem, order, anchors, peak - length):
        yield plan.saved | {index}, plan.drops


def _made_around(
    problem: Problem, order: Sequence[int], anchors: Collection[int], peak: int
) -> list[int]:
    """What is computed again in the same run of recomputation as the peak, and could be saved."""
    begin = max((p for p in range(peak) if order[p] in anchors), default=-1) + 1
    end = next((p for p in range(peak, len(order)) if order[p] in anchors), len(order))
    ops = problem.ops
    return [
        i
        for i in dict.fromkeys(order[begin:end])
        if ops[i].forward and ops[i].savable and not ops[i].must_recompute
    ]
