"""Different decisions for different layers: a dynamic program over the chain of regions.

While region r is undone there are alive: what regions 1..r saved, the gradients of the regions
after r, and r's own working set. So the budget of region r involves only the *prefix sum* of saved
bytes, and going forward over the regions with that sum as the state solves the chain.

A *span* of like regions saves only what enters its first one (checkpoints every k layers; Chen et
al., arXiv:1604.06174). When its last region is undone, the borders inside the span are computed in
one run and kept, all else of that run is dropped, and each region then computes its own values once
more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckpt_pass.planner.menu import Entry, Menus
from ckpt_pass.planner.problem import Problem
from ckpt_pass.planner.schedule import Drop, unroll

# Saved bytes are rounded to this fraction of the budget. Whoever asks for a mix simulates it, and
# asks for a little less where rounding led above the budget.
_STATES = 2048
# Regions in a span: the square root of the longest chains of today's models is near 12.
_LENGTHS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)

#: The entry number and the length of the span for each state; -1 where there is no way.
_Choices: TypeAlias = tuple[NDArray[np.int32], NDArray[np.int32]]
#: Length of the span, number of the entry, bytes that it saves, that it needs besides, seconds.
_Option: TypeAlias = tuple[int, int, int, int, float]


@dataclass(frozen=True)
class Mix:
    """A choice for every region.

    Attributes:
        saved, drops: of the whole step.
    """

    saved: frozenset[int]
    drops: frozenset[Drop]


@dataclass(frozen=True)
class _Link:
    """One region or a span of them, done in one way.

    Attributes:
        first, last: positions of the regions.
        entry: the choice for each of them.
    """

    first: int
    last: int
    entry: Entry


class Chain:
    """The dynamic program over the menus of a problem."""

    def __init__(self, problem: Problem, menus: Menus) -> None:
        self._problem, self._menus = problem, menus
        self._options: dict[tuple[int, bool], list[_Option]] = {}  # the same for all budgets

    def best_mix(self, budget_bytes: int, *, spans: bool) -> Mix | None:
        """The mix of least recompute time within a budget; ``None`` if none fits.

        Args:
            budget_bytes: the peak to stay within.
            spans: whether regions may save nothing at all.
        """
        if budget_bytes <= 0:
            return None
        unit = max(1, -(-budget_bytes // _STATES))
        start = np.full(budget_bytes // unit + 1, np.inf)
        start[0] = 0.0
        best, chosen = [start], []
        for position in range(len(self._menus.regions)):
            after, choice = self._region(position, best, budget_bytes, unit, spans)
            best.append(after)
            chosen.append(choice)
        if not np.isfinite(best[-1]).any():
            return None
        return self._compose(self._read_back(int(np.argmin(best[-1])), chosen, unit))

    def _region(
        self,
        position: int,
        best: Sequence[NDArray[np.float64]],
        budget_bytes: int,
        unit: int,
        spans: bool,
    ) -> tuple[NDArray[np.float64], _Choices]:
        """The least time for each sum of saved bytes after a region, and the choice for it."""
        width = len(best[0])
        after = np.full(width, np.inf)
        number = np.full(width, -1, dtype=np.int32)
        length = np.ones(width, dtype=np.int32)
        if (position, spans) not in self._options:
            self._options[position, spans] = self._options_at(position, spans)
        for size, k, saved_bytes, needs, time_s in self._options[position, spans]:
            step = round(saved_bytes / unit)
            top = min(width - 1, (budget_bytes - needs) // unit)  # on the sum, this region in it
            if top < step:
                continue
            cost = best[position + 1 - size][: top - step + 1] + time_s
            better = cost < after[step : top + 1]
            np.copyto(after[step : top + 1], cost, where=better)
            number[step : top + 1][better] = k
            length[step : top + 1][better] = size
        return after, (number, length)

    def _options_at(self, position: int, spans: bool) -> list[_Option]:
        """What a region may do, alone or as the last of a span, and what that costs."""
        menus, kind = self._menus, self._menus.regions[position].kind
        found = [(1, k, e) for k, e in enumerate(menus.entries[kind])]
        for size in self._lengths(position) if spans else ():
            found += [(size, k, e) for k, e in enumerate(menus.lean[kind])]
        return [(n, k, e.saved_bytes, *self._cost(position, n, e)) for n, k, e in found]

    def _lengths(self, position: int) -> list[int]:
        """How long a span may be that ends at a region: all of it is of one kind."""
        regions = self._menus.regions
        same = 0
        while same <= position and regions[position - same].kind == regions[position].kind:
            same += 1
        return [size for size in _LENGTHS if size <= same]

    def _cost(self, position: int, size: int, entry: Entry) -> tuple[int, float]:
        """Bytes needed besides the sum of what is saved, and recompute time."""
        brings = self._menus.brings
        if size == 1:
            needs = max(entry.working_bytes + brings[position], entry.forward_bytes)
            return needs, entry.time_s
        first = position + 1 - size
        needs = max(
            entry.working_bytes + brings[first + k] + k * entry.saved_bytes for k in range(size)
        )
        again = self._menus.forward_time_s[self._menus.regions[position].kind]
        return max(needs, entry.forward_bytes), size * entry.time_s + (size - 1) * again

    def _read_back(self, state: int, chosen: Sequence[_Choices], unit: int) -> list[_Link]:
        links = []
        position = len(chosen) - 1
        while position >= 0:
            number, length = chosen[position]
            size = int(length[state])
            kind = self._menus.regions[position].kind
            menu = self._menus.entries[kind] if size == 1 else self._menus.lean[kind]
            entry = menu[int(number[state])]
            links.append(_Link(position + 1 - size, position, entry))
            state -= round(entry.saved_bytes / unit)
            position -= size
        return links

    def _compose(self, links: Sequence[_Link]) -> Mix:
        # A region may run again what takes a bound value of another one, whose own way leaves it.
        saved: set[int] = set(self._problem.bound)
        drops: set[Drop] = set()
        regions = self._menus.regions
        for link in links:
            model = self._menus.models[regions[link.last].kind]
            saved |= regions[link.last].translated(model, link.entry.saved)
            for region in regions[link.first : link.last + 1]:
                drops |= region.translated_drops(model, link.entry.drops)
        for link in links:
            if link.last > link.first:
                drops |= self._run_drops(link, saved)
        return Mix(frozenset(saved), frozenset(drops))

    def _run_drops(self, link: _Link, saved: set[int]) -> set[Drop]:
        """After the run through a span: what is dropped, all but the borders inside."""
        regions, ops = self._menus.regions, self._problem.ops
        model = self._menus.models[regions[link.last].kind]
        inner = regions[link.first : link.last]
        borders = {i for r in inner for i in r.translated(model, link.entry.saved)}
        inside = {index for region in inner for index in region.members}
        undone = regions[link.last]
        order, _ = unroll(self._problem, undone.anchors, {*saved, *undone.earlier}, ())
        ran = [index for index in order if index in inside]
        if not ran:  # what the last region needs is there without them
            return set()
        anchors = set(undone.anchors)
        begin = order.index(ran[0])
        end = next(index for index in order[begin:] if index in anchors)
        kept = {s for index in borders for s in ops[index].holds}
        return {
            (end, i)
            for i in ran
            if ops[i].makes and self._problem.may_repeat(i) and not kept.intersection(ops[i].makes)
        }
