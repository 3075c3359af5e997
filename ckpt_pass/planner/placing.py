"""When moved storages are released and fetched: as late, and as early, as the budget permits.

A release waits for a copy out, so that it costs least where it comes last: the forward is gone
through, and where the step would be over the budget the copy that is done first, of those whose
storage the forward needs no more, is waited for. A fetch costs least where it comes first; in
reversed time it is a release, and the same way is gone. Copies come back in the order of their
first uses.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ckpt_pass.planner.tables import Ints


def released_at(
    over: NDArray[np.int64], last: Sequence[int], nbytes: Sequence[int]
) -> list[int] | None:
    """For each storage the place after which it is released; ``None`` if that is not enough.

    Args:
        over: bytes above the budget while each op runs, with nothing moved.
        last: for each storage, in the order in which their copies are done, the place of the last
            op that needs it.
        nbytes: of each.
    """
    required = np.maximum.accumulate(over)  # what is away stays away
    found = [len(over) - 1] * len(last)
    waiting = sorted(range(len(last)), key=last.__getitem__, reverse=True)
    free: list[int] = []
    away = 0
    while True:
        place = int(required.searchsorted(away, side="right"))
        if place >= len(required):
            return found
        while waiting and last[waiting[-1]] < place:
            heapq.heappush(free, waiting.pop())
        while away < required[place]:
            if not free:
                return None
            row = heapq.heappop(free)
            found[row] = place - 1
            away += nbytes[row]


def fetched_at(over: NDArray[np.int64], first: Ints, nbytes: Ints) -> list[int] | None:
    """For each storage the place before which it is fetched; ``None`` if that is too early.

    Args:
        over: bytes above the budget while each op of the backward runs, with nothing moved.
        first: for each storage the place of its first use.
        nbytes: of each.
    """
    end = len(over) - 1
    order = np.argsort(first, kind="stable")[::-1]
    mirrored = released_at(over[::-1], (end - first[order]).tolist(), nbytes[order].tolist())
    if mirrored is None:
        return None
    found = [0] * len(first)
    for row, place in zip(order.tolist(), mirrored, strict=True):
        found[row] = end - place
    return found
