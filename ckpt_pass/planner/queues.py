"""The two copy queues beside the compute queue, on arrays: the inner loop of the clock.

Both functions follow one half of a step. Ops are told by the seconds at which they end or begin
where nothing waits; what waits moves all that comes later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Copies:
    """The copies of one direction, in the order in which they were given.

    Attributes:
        start_s, end_s: of each copy.
        memory_s: when the device's memory is free (copies out) or taken (copies in).
        waits: (place of the op, seconds): before it (copies in) or after it (copies out) the
            compute queue waits.
    """

    start_s: list[float]
    end_s: list[float]
    memory_s: list[float]
    waits: list[tuple[int, float]] = field(default_factory=list)

    @property
    def stall_s(self) -> float:
        """Seconds of all waits."""
        return sum(seconds for _, seconds in self.waits)


def copies_out(
    ends_s: Sequence[float],
    made: Sequence[int],
    released: Sequence[int],
    seconds: Sequence[float],
) -> Copies:
    """Run the copies out beside the forward.

    Args:
        ends_s: when each op of the forward ends.
        made: for each storage the place of the op that makes it; ascending.
        released: the place of the op after which its copy is waited for; not before ``made``.
        seconds: of each copy.
    """
    count = len(made)
    found = Copies([0.0] * count, [0.0] * count, [0.0] * count)
    delay = free = 0.0
    issued = 0
    for row in sorted(range(count), key=released.__getitem__):
        place = released[row]
        while issued < count and made[issued] <= place:
            begin = max(free, ends_s[made[issued]] + delay)
            free = begin + seconds[issued]
            found.start_s[issued], found.end_s[issued] = begin, free
            issued += 1
        late = found.end_s[row] - (ends_s[place] + delay)
        if late > 0:
            found.waits.append((place, late))
            delay += late
        found.memory_s[row] = ends_s[place] + delay
    return found


def copies_in(
    starts_s: Sequence[float],
    fetched: Sequence[int],
    first: Sequence[int],
    seconds: Sequence[float],
) -> Copies:
    """Run the copies in beside the backward; its first op begins at 0.

    Args:
        starts_s: when each op of the backward begins.
        fetched: for each storage the place of the op before which its copy is issued; what is
            issued at one place comes in the order of first use.
        first: the place of its first use; not before ``fetched``.
        seconds: of each copy.
    """
    count = len(fetched)
    found = Copies([0.0] * count, [0.0] * count, [0.0] * count)
    order = sorted(range(count), key=lambda row: (fetched[row], first[row], row))
    delay = free = 0.0
    issued = 0
    for row in sorted(range(count), key=first.__getitem__):
        place = first[row]
        while issued < count and fetched[order[issued]] <= place:
            one = order[issued]
            found.memory_s[one] = starts_s[fetched[one]] + delay
            found.start_s[one] = max(free, found.memory_s[one])
            found.end_s[one] = free = found.start_s[one] + seconds[one]
            issued += 1
        late = found.end_s[row] - (starts_s[place] + delay)
        if late > 0:
            found.waits.append((place, late))
            delay += late
    return found
