"""What ranks share out of an eager step: a part of what regions are given, and its gathering.

A rank's part is there from the region's forward until the region is done. The whole is gathered
when the region runs again, and is there as long, or as long as autograd holds what it saves of it
then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ckpt_pass.planner.eager_parts import EagerPlan, EagerRegion, Ranks, SavedValue

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ShareLife:
    """A part, or the whole that was gathered, in memory: places, the last one not included."""

    storage: int
    nbytes: int
    begin: int
    end: int
    is_part: bool


def shares_of(
    regions: Sequence[EagerRegion],
    values: Sequence[SavedValue],
    plan: EagerPlan,
    places: tuple[Ints, Ints, Ints],
) -> tuple[ShareLife, ...]:
    """The parts and the wholes of what ranks share out.

    What several regions are given is kept once, and gathered by each.

    Args:
        regions, values: of the step.
        plan: what is shared out.
        places: where ops begin, where a death at a moment falls, and where reruns begin.
    """
    before_op, before_death, starts = places
    parts: dict[int, ShareLife] = {}
    wholes = []
    for index in sorted(plan.shards):
        region = regions[index]
        first, last = int(before_op[region.ops[0]]), int(before_death[region.done])
        start = int(starts[index])
        for storage, part, whole in region.parts:
            known = parts.get(storage)
            begin = first if known is None else min(known.begin, first)
            end = last if known is None else max(known.end, last)
            parts[storage] = ShareLife(storage, part, begin, end, True)
            taken = start + region.needed
            for value in values[slice(*region.values)]:
                if value.storage == storage:
                    released = value.released if value.asked else region.done
                    taken = max(taken, int(before_death[released]))
            wholes.append(ShareLife(storage, whole, start, taken, False))
    return (*parts.values(), *wholes)


def gathers(
    regions: Sequence[EagerRegion], ranks: Ranks | None, plan: EagerPlan
) -> tuple[float, int]:
    """Seconds and bytes of what ranks gather from each other."""
    if ranks is None:
        return 0.0, 0
    wholes = [whole for index in plan.shards for _, _, whole in regions[index].parts]
    return sum(map(ranks.gather_s, wholes)), sum(map(ranks.received_bytes, wholes))
