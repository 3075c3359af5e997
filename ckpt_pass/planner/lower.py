"""Lower the peak of a whole plan, whatever the recompute time: how far down a step can go.

Each step looks at the moment of the peak. What is saved and idle there is computed again instead;
what was computed again and is idle is dropped; what is being computed again is saved. The move that
costs the least time for the bytes that it takes off the peak is made, until none helps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from ckpt_pass.planner.liveness import backward_lives
from ckpt_pass.planner.problem import Problem
from ckpt_pass.planner.schedule import Drop, anchor_order
from ckpt_pass.planner.solution import Solution, evaluate
from ckpt_pass.planner.squeeze import idle_drops

_Plan = tuple[frozenset[int], frozenset[Drop]]


@dataclass(frozen=True)
class Curve:
    """The bytes whose peak is to be lowered.

    Attributes:
        bytes_at: while each op of the schedule runs.
        away: storages that are not there at the peak: to save less of them helps nothing.
    """

    bytes_at: Sequence[int]
    away: Collection[int] = ()

    @property
    def peak_bytes(self) -> int:
        """The most bytes."""
        return max(self.bytes_at, default=0)

    @property
    def peak_index(self) -> int:
        """Where they are first reached."""
        return self.bytes_at.index(self.peak_bytes) if self.bytes_at else 0

    @property
    def height(self) -> tuple[int, int]:
        """The peak, and at how many moments it is reached: what a step must lower."""
        return self.peak_bytes, self.bytes_at.count(self.peak_bytes)


def _curve(plan: Solution) -> Curve:
    return Curve(plan.profile.bytes_at)


def lowered(
    problem: Problem,
    plan: Solution,
    evaluations: int,
    curve: Callable[[Solution], Curve] = _curve,
    enough_bytes: int = 0,
) -> list[Solution]:
    """Plans with ever lower peaks.

    Args:
        problem: the step.
        plan: where to begin.
        evaluations: how many plans may be simulated.
        curve: whose peak it is; by default that of the plan itself.
        enough_bytes: a peak that need not be lowered.
    """
    found: list[Solution] = []
    current, now = plan, curve(plan)
    while evaluations > 0 and now.peak_bytes > enough_bytes:
        best, best_price = None, float("inf")
        for saved, drops in _moves(problem, current, now):
            if evaluations <= 0:
                break
            evaluations -= 1
            tried = evaluate(problem, saved | problem.bound, "lowered peak", drops)
            then = curve(tried)
            if then.height >= now.height:
                continue
            freed = now.peak_bytes - then.peak_bytes or 1
            price = (tried.recompute_time_s - current.recompute_time_s) / freed
            if price < best_price:
                best, best_price = (tried, then), price
        if best is None:
            break
        current, now = best
        found.append(current)
    return found


def _moves(problem: Problem, plan: Solution, curve: Curve) -> Iterator[_Plan]:
    """Saved sets and drops in which something that lies at the peak does not."""
    peak, length = curve.peak_index, plan.profile.forward_length
    at = problem.ops[plan.profile.schedule[peak]]
    away = frozenset(curve.away)
    for index in sorted(plan.saved):
        op = problem.ops[index]
        idle = not set(op.holds).intersection(at.touches) and not away.issuperset(op.holds)
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
