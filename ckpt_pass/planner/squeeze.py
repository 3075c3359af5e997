"""Lower the peak of one region's backward by recomputing values again.

At the moment of the peak some values are there that nothing uses just then. A value that can be
computed again is dropped after its last use before the peak, and made once more before its next
use. The cheapest such drop for the bytes that it frees is taken, and the next peak is looked at:
each step is a plan with a lower peak and more recomputation.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from ckpt_pass.planner.liveness import Lives, Tables, lives
from ckpt_pass.planner.problem import Problem
from ckpt_pass.planner.schedule import Drop, unroll
from ckpt_pass.planner.segments import Segment

# Candidates simulated for each step, the cheapest for their bytes first: more changed no plan of
# the reference models by more than 0.1 % of the step.
_CANDIDATES = 6


@dataclass(frozen=True)
class Undone:
    """A region's backward, as it runs with given drops.

    Attributes:
        drops: what is not kept.
        order: the ops as they run, recomputation included.
        transient: see :class:`ckpt_pass.planner.schedule.Schedule`.
        lives: what is alive when.
        time_s: recompute time.
    """

    drops: frozenset[Drop]
    order: tuple[int, ...]
    lives: Lives
    time_s: float

    @property
    def peak_bytes(self) -> int:
        """The most bytes while the region is undone, those of regions before it not counted."""
        return int(self.lives.bytes_at.max(initial=0))

    @property
    def height(self) -> tuple[int, int]:
        """The peak, and at how many moments it is reached: what a step must lower."""
        at = self.lives.bytes_at
        return self.peak_bytes, int((at == at.max(initial=0)).sum())


def undo(
    problem: Problem, segment: Segment, saved: Collection[int], drops: frozenset[Drop] = frozenset()
) -> Undone:
    """Run the backward of one region in thought.

    Args:
        problem: the step.
        segment: the region.
        saved: ops that the whole step saves; those of this region count.
        drops: what is not kept.
    """
    had = {*saved, *segment.earlier}
    order, transient = unroll(problem, segment.anchors, had, drops)
    own = {s for i in saved if i in segment.place_of for s in problem.ops[i].holds}
    found = lives(problem, order, own | segment.there, segment.kept, transient)
    return Undone(drops, tuple(order), found, recompute_time(problem, order))


def recompute_time(problem: Problem, order: Collection[int]) -> float:
    """Seconds of the forward ops in a backward, and of whatever else runs again in it."""
    ops = problem.ops
    once: set[int] = set()
    total = 0.0
    for index in order:
        if ops[index].forward or index in once:
            total += ops[index].time_s
        once.add(index)
    return total


def squeezed(
    problem: Problem, segment: Segment, saved: Collection[int], steps: int
) -> Iterator[Undone]:
    """The region's backward, and the same with ever lower peaks, each step one drop more."""
    current = undo(problem, segment, saved)
    yield current
    for _ in range(steps if current.order else 0):
        better = _best_drop(problem, segment, saved, current)
        if better is None:
            return
        if better.peak_bytes < current.peak_bytes:
            yield better
        current = better


def _best_drop(
    problem: Problem, segment: Segment, saved: Collection[int], current: Undone
) -> Undone | None:
    peak = int(current.lives.bytes_at.argmax())
    best, best_price = None, float("inf")
    for drop in _candidates(problem, segment, current, peak)[:_CANDIDATES]:
        found = undo(problem, segment, saved, current.drops | {drop})
        if found.height >= current.height:
            continue
        freed = current.peak_bytes - found.peak_bytes or 1
        price = (found.time_s - current.time_s) / freed
        if price < best_price:
            best, best_price = found, price
    return best


def _candidates(problem: Problem, segment: Segment, current: Undone, peak: int) -> list[Drop]:
    """Drops that could lower the peak, the cheapest for their bytes first."""
    alive = current.lives
    sizes, makers = Tables.of(problem).sizes, problem.makers
    idle = np.flatnonzero((alive.first < peak) & (alive.last > peak) & alive.made)
    anchors = set(segment.anchors)
    found: dict[Drop, tuple[float, Drop]] = {}
    for instance in idle:
        storage = int(alive.storage[instance])
        maker = makers.get(storage)
        if maker is None or not sizes[storage] or not problem.may_repeat(maker):
            continue
        uses = [
            place
            for place in range(int(alive.first[instance]), int(alive.last[instance]) + 1)
            if storage in problem.ops[current.order[place]].touches
        ]
        if peak in uses or not (uses[0] < peak < uses[-1]):
            continue
        before, after = max(u for u in uses if u < peak), min(u for u in uses if u > peak)
        place = next(p for p in range(before, len(current.order)) if current.order[p] in anchors)
        if place < after:
            drop = (current.order[place], maker)
            price = problem.ops[maker].time_s / float(sizes[storage])
            found[drop] = (price, drop)
    return [drop for _, drop in sorted(found.values())]
