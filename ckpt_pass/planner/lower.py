"""Lower the peak of a whole plan, whatever the recompute time: how far down a step can go.

Each step looks at the moment of the peak. What is saved and idle there is computed again instead;
what was computed again and is idle is dropped; what is being computed again is saved. The move that
costs the least time for the bytes that it takes off the peak is made, until none helps.
"""

from __future__ import annotations

from collections.abc import Iterator

from ckpt_pass.planner.liveness import lives
from ckpt_pass.planner.problem import Problem
from ckpt_pass.planner.schedule import Drop, anchor_order
from ckpt_pass.planner.solution import Solution, evaluate

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
    for drop in _drops(problem, plan, peak - length):
        yield plan.saved, plan.drops | {drop}
    for index in _made_around(problem, plan, peak - length):
        yield plan.saved | {index}, plan.drops


def _drops(problem: Problem, plan: Solution, peak: int) -> Iterator[Drop]:
    """Drops of what was computed again before the peak and is read after it."""
    order, outputs = plan.steps.backward, set(problem.forward_outputs)
    held = {s for index in plan.saved for s in problem.ops[index].holds}
    kept = {*outputs, *problem.output_storages, *problem.given}
    there = held | outputs | set(problem.given)
    alive = lives(problem, order, there, kept, plan.steps.transient)
    anchors = set(anchor_order(problem))
    for storage, first, last, made in zip(
        alive.storage.tolist(), alive.first.tolist(), alive.last.tolist(), alive.made, strict=True
    ):
        maker = problem.makers.get(storage)
        if not made or not first < peak < last or maker is None or not problem.may_repeat(maker):
            continue
        uses = [p for p in range(first, last + 1) if storage in problem.ops[order[p]].touches]
        before = max(use for use in uses if use <= peak)
        after = min(use for use in uses if use > peak)
        place = next((p for p in range(before, after) if order[p] in anchors), None)
        if before < peak and place is not None and problem.storage_bytes[storage]:
            yield order[place], maker


def _made_around(problem: Problem, plan: Solution, peak: int) -> list[int]:
    """What is computed again in the same run of recomputation as the peak, and could be saved."""
    order, anchors = plan.steps.backward, set(anchor_order(problem))
    begin = max((p for p in range(peak) if order[p] in anchors), default=-1) + 1
    end = next((p for p in range(peak, len(order)) if order[p] in anchors), len(order))
    ops = problem.ops
    return [
        i
        for i in dict.fromkeys(order[begin:end])
        if ops[i].forward and ops[i].savable and not ops[i].must_recompute
    ]
