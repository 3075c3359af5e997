"""Different decisions for different layers: a dynamic program over a chain of regions.

While region r is undone there are alive: what regions 1..r saved, the gradients of the regions
after r, and r's own working set. So the budget of region r involves only the *prefix sum* of saved
bytes, and going forward over the regions with that sum as the state is exact for the menus given.
A menu entry is what a uniform cut at one price saves in a region, and what it costs there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ckpt_pass.planner.liveness import MemoryProfile
from ckpt_pass.planner.problem import Problem

# Saved bytes are rounded up to this fraction of the budget, so that feasible stays feasible; the
# error of a chain of 32 regions is then at most 1.6 % of the budget.
_STATES = 2048


@dataclass(frozen=True)
class Entry:
    """One choice for one region.

    Attributes:
        saved: the region's ops to save.
        saved_bytes: what they hold.
        time_s: recompute time of the region.
        working_bytes: the most bytes while the region is undone, less what this and earlier
            regions saved.
    """

    saved: frozenset[int]
    saved_bytes: int
    time_s: float
    working_bytes: int


def menus(
    problem: Problem, plans: Sequence[tuple[frozenset[int], MemoryProfile]]
) -> list[list[Entry]]:
    """What uniform plans do in each region, regions in the order of the forward."""
    order = list(dict.fromkeys(op.region for op in problem.ops if op.forward))
    position = {region: i for i, region in enumerate(order)}
    found: list[list[Entry]] = [[] for _ in order]
    for saved, profile in plans:
        for region, entry in enumerate(_entries(problem, position, saved, profile)):
            found[region].append(entry)
    return [_undominated(menu) for menu in found]


def _entries(
    problem: Problem, position: dict[int, int], saved: frozenset[int], profile: MemoryProfile
) -> list[Entry]:
    count = len(position)
    members: list[set[int]] = [set() for _ in range(count)]
    nbytes, times, peaks = [0] * count, [0.0] * count, [0] * count
    held: set[int] = set(problem.forward_outputs)
    for index in sorted(saved):
        region = position[problem.ops[index].region]
        members[region].add(index)
        new = set(problem.ops[index].holds) - held
        nbytes[region] += sum(problem.storage_bytes[s] for s in new)
        held |= new
    last = count - 1
    for place, index in enumerate(profile.schedule):
        op = problem.ops[index]
        if place >= profile.forward_length:
            last = position.get(op.region, last)
            if op.forward:
                times[last] += op.time_s
        region = last if place >= profile.forward_length else count - 1
        peaks[region] = max(peaks[region], profile.bytes_at[place])
    before = np.cumsum(nbytes)
    return [
        Entry(frozenset(members[r]), nbytes[r], times[r], peaks[r] - int(before[r]))
        for r in range(count)
    ]


def _undominated(menu: list[Entry]) -> list[Entry]:
    """Entries that no other beats in bytes, time and working set at once."""
    kept: list[Entry] = []
    for entry in sorted(menu, key=lambda e: (e.time_s, e.saved_bytes, e.working_bytes)):
        if not any(
            k.saved_bytes <= entry.saved_bytes and k.working_bytes <= entry.working_bytes
            for k in kept
        ):
            kept.append(entry)
    return kept


def best_mix(menu_of: list[list[Entry]], budget_bytes: int) -> frozenset[int] | None:
    """The mix of menu entries of least recompute time within the budget; ``None`` if none fits."""
    if budget_bytes <= 0:
        return None
    unit = max(1, -(-budget_bytes // _STATES))
    width = budget_bytes // unit + 1
    best = np.full(width, np.inf)
    best[0] = 0.0
    chosen: list[np.ndarray] = []
    for menu in menu_of:
        after = np.full(width, np.inf)
        choice = np.full(width, -1, dtype=np.int32)
        for number, entry in enumerate(menu):
            step = -(-entry.saved_bytes // unit)
            limit = (budget_bytes - entry.working_bytes) // unit  # on the sum, this region in it
            top = min(width - 1, limit)
            if top < step:
                continue
            cost = best[: top - step + 1] + entry.time_s
            target = slice(step, top + 1)
            better = cost < after[target]
            after[target] = np.where(better, cost, after[target])
            choice[target] = np.where(better, number, choice[target])
        best = after
        chosen.append(choice)
    if not np.isfinite(best).any():
        return None
    state = int(np.argmin(best))
    saved: set[int] = set()
    for menu, choice in zip(reversed(menu_of), reversed(chosen), strict=True):
        entry = menu[int(choice[state])]
        saved |= entry.saved
        state -= -(-entry.saved_bytes // unit)
    return frozenset(saved)
