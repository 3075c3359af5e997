"""What ranks share out of an eager step: a part of what regions are given, and its gathering.

A rank's part is there from the region's forward until the region is done. The whole is gathered
when the region runs again, and is there as long, or as long as autograd holds what it saves of it
then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ckpt_pass.planner.eager_parts import EagerPlan, EagerRegion, Ranks, SavedValue

Ints = npt.NDArray[np.int64]


def share_out(
    regions: Sequence[EagerRegion],
    values: Sequence[SavedValue],
    plan: EagerPlan,
    delta: Ints,
    places: tuple[Ints, Ints, Mapping[int, int]],
) -> int:
    """Add the parts and the wholes to the changes of a step's bytes.

    What several regions are given is kept once, and gathered by each.

    Args:
        regions, values: of the step.
        plan: what is shared out.
        delta: the changes, by place.
        places: where ops begin, where a death at a moment falls, and where reruns begin.

    Returns:
        The bytes of all parts.
    """
    before_op, before_death, starts = places
    spans: dict[int, tuple[int, int, int]] = {}
    for index in sorted(plan.shards):
        region = regions[index]
        first, last = int(before_op[region.ops[0]]), int(before_death[region.done])
        for storage, part, whole in region.parts:
            begin, end, _ = spans.get(storage, (first, last, part))
            spans[storage] = min(begin, first), max(end, last), part
            taken = starts[index] + region.needed
            for value in values[slice(*region.values)]:
                if value.storage == storage:
                    released = value.released if value.asked else region.done
                    taken = max(taken, int(before_death[released]))
            delta[starts[index]] += whole
            delta[taken] -= whole
    for begin, end, part in spans.values():
        delta[begin] += part
        delta[end] -= part
    return sum(part for _, _, part in spans.values())


def gathers(
    regions: Sequence[EagerRegion], ranks: Ranks | None, plan: EagerPlan
) -> tuple[float, int]:
    """Seconds and bytes of what ranks gather from each other."""
    if ranks is None:
        return 0.0, 0
    wholes = [whole for index in plan.shards for _, _, whole in regions[index].parts]
    return sum(map(ranks.gather_s, wholes)), sum(map(ranks.received_bytes, wholes))
