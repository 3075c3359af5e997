"""Lower the peak of one region's backward by recomputing values again.

At the moment of the peak some values are there that nothing uses just then. A value that can be
computed again is dropped after its last use before the peak, and made once more before its next
use. The cheapest such drop for the bytes that it frees is taken, and the next peak is looked at:
each step is a plan with a lower peak and more recomputation.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ckpt_pass.planner.liveness import Lives, lives
from ckpt_pass.planner.problem import Problem
from ckpt_pass.planner.schedule import Drop, unroll
from ckpt_pass.planner.segments import Segment
from ckpt_pass.planner.solution import repeated

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
    there = own | segment.there
    found = lives(problem, order, there, segment.kept, transient, earlier=segment.there)
    time_s = sum(problem.ops[index].time_s for index in repeated(problem, order))
    return Undone(drops, tuple(order), found, time_s)


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
    drops = idle_drops(problem, current.order, current.lives, peak, set(segment.anchors))
    for more in [*drops[:_CANDIDATES], *drops[_CANDIDATES:][-1:]]:
        found = undo(problem, segment, saved, current.drops | more)
        if found.height >= current.height:
            continue
        freed = current.peak_bytes - found.peak_bytes or 1
        price = (found.time_s - current.time_s) / freed
        if price < best_price:
            best, best_price = found, price
    return best


def idle_drops(
    problem: Problem, order: Sequence[int], alive: Lives, peak: int, anchors: Collection[int]
) -> list[frozenset[Drop]]:
    """Drops of what was computed again before a moment, is read after it, and is idle there.

    With a value goes what it is made from, unless that is there at the moment in any case: else its
    sources would be kept in its place.

    Args:
        problem: the step.
        order: a backward, or a part of it.
        alive: what is alive along it.
        peak: the moment, as a place in it.
        anchors: those of its ops that are anchors.

    Returns:
        The cheapest for their bytes first, and then all of them at once.
    """
    found: dict[frozenset[Drop], tuple[float, list[Drop]]] = {}
    crossing = set(alive.storage[(alive.first <= peak) & (alive.last >= peak)].tolist())
    ran = set(order[:peak])
    for instance in np.flatnonzero((alive.first < peak) & (alive.last > peak) & alive.made):
        storage = int(alive.storage[instance])
        maker, nbytes = problem.makers.get(storage), problem.storage_bytes[storage]
        if maker is None or not nbytes or not problem.may_repeat(maker):
            continue
        span = range(int(alive.first[instance]), int(alive.last[instance]) + 1)
        uses = [place for place in span if storage in problem.ops[order[place]].touches]
        if peak in uses:
            continue
        before, after = max(u for u in uses if u < peak), min(u for u in uses if u > peak)
        place = next((p for p in range(before, after) if order[p] in anchors), None)
        if place is None:
            continue
        makers = _made_for(problem, maker, ran, crossing)
        drops = frozenset((order[place], index) for index in makers)
        price = sum(problem.ops[index].time_s for index in makers) / nbytes
        found[drops] = (price, sorted(drops))
    cheapest = sorted(found, key=found.__getitem__)
    return cheapest if len(cheapest) < 2 else [*cheapest, frozenset().union(*cheapest)]


def _made_for(
    problem: Problem, maker: int, ran: Collection[int], there: Collection[int]
) -> set[int]:
    """An op, and those before it that must run again for it where only ``there`` is there."""
    ops, found, stack = problem.ops, {maker}, list(problem.ops[maker].inputs)
    seen = set(stack)
    while stack:
        index = stack.pop()
        op = ops[index]
        if op.makes:
            if index not in ran or not problem.may_repeat(index) or set(op.makes) & set(there):
                continue
            found.add(index)
        new = [source for source in op.inputs if source not in seen]
        seen.update(new)
        stack += new
    return found
