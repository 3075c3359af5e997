"""Which storages to move: a set that takes a plan below its budget, in some order of preference.

A storage is away over a stretch from its last use in the forward to its first one in the backward.
Storages are taken in order where they help at a place that is over the budget still, until none is;
those without which it fits as well are given back.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ckpt_pass.planner.ground import Ground, Mask
from ckpt_pass.planner.tables import Ints


class Cover:
    """What a plan has over a budget, place by place.

    Only the places matter at which a storage begins or ends to be away: of those between two, the
    highest.

    Args:
        ground: the plan.
        budget_bytes: the budget.
    """

    def __init__(self, ground: Ground, budget_bytes: int) -> None:
        self.ground, self.budget_bytes = ground, budget_bytes
        rows = ground.rows
        begins, self._begin = np.unique(rows.last + 1, return_inverse=True)
        ends, self._end = np.unique(rows.first, return_inverse=True)
        forward, backward = ground.forward_bytes, ground.backward_bytes
        forward, backward = forward - budget_bytes, backward - budget_bytes
        # Before the first storage is away, and after the last one is back, nothing helps.
        self._always = max(
            int(forward[: begins[0]].max(initial=0)) if len(begins) else _most(forward),
            int(backward[ends[-1] :].max(initial=0)) if len(ends) else _most(backward),
        )
        inside = begins[begins < len(forward)]
        self._forward = np.full(len(begins), -1, dtype=np.int64)
        if len(inside):
            self._forward[: len(inside)] = np.maximum.reduceat(forward, inside)
        cuts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
        self._backward = np.full(len(ends), -1, dtype=np.int64)
        if len(ends) and ends[-1] > 0:
            heads = cuts[cuts < ends]
            found = np.maximum.reduceat(backward[: ends[-1]], heads)
            self._backward[cuts < ends] = found
        self._nbytes = rows.nbytes.tolist()

    @property
    def most_over(self) -> int:
        """The most bytes over the budget where moving helps."""
        return max(_most(self._forward), _most(self._backward))

    def chosen(
        self, order: Iterable[int], start: Mask | None = None, kept: int | None = None
    ) -> Mask | None:
        """A set that covers all that is over, or ``None``.

        Args:
            order: rows, the preferred ones first.
            start: rows that are moved to begin with; they are given back last.
            kept: one of them that is not given back.
        """
        if self._always > 0:
            return None
        forward, backward = self._forward.copy(), self._backward.copy()
        room = self.ground.link.host_bytes
        taken: list[int] = []
        mask = np.zeros(len(self._nbytes), dtype=bool)

        def take(row: int) -> bool:
            nbytes = self._nbytes[row]
            nonlocal room
            if room is not None:
                if nbytes > room:
                    return False
                room -= nbytes
            forward[self._begin[row] :] -= nbytes
            backward[: self._end[row] + 1] -= nbytes
            taken.append(row)
            mask[row] = True
            return True

        must = self.ground.must
        if not all([take(row) for row in np.flatnonzero(must).tolist()]):
            return None
        for row in np.flatnonzero(start & ~must).tolist() if start is not None else ():
            take(row)
        rest = (row for row in order if not mask[row])
        while _most(forward) > 0 or _most(backward) > 0:
            found = next(rest, None)
            if found is None:
                return None
            ahead, behind = forward[self._begin[found] :], backward[: self._end[found] + 1]
            if _most(ahead) > 0 or _most(behind) > 0:
                take(found)
        for row in reversed(taken):
            if row == kept or must[row]:
                continue
            nbytes = self._nbytes[row]
            ahead, behind = forward[self._begin[row] :], backward[: self._end[row] + 1]
            if (
                ahead.max(initial=-nbytes) + nbytes <= 0
                and behind.max(initial=-nbytes) + nbytes <= 0
            ):
                ahead += nbytes
                behind += nbytes
                mask[row] = False
        return mask


def by_idle_time(ground: Ground, budget_bytes: int) -> list[int]:
    """Rows, those first that are away for the longest while the plan is over its budget."""
    rows = ground.rows
    over_s = _seconds_over(ground.ends_s, ground.forward_s, ground.forward_bytes > budget_bytes)
    ahead = over_s[-1] - over_s[np.minimum(rows.last + 1, len(over_s) - 1)]
    backward_s = ground.compute_s - ground.forward_s
    ends = [*ground.starts_s[1:], backward_s]
    over_s = _seconds_over(ends, backward_s, ground.backward_bytes > budget_bytes)
    idle = ahead + over_s[rows.first]
    return sorted(range(len(rows)), key=lambda row: (-round(float(idle[row]), 12), row))


def _seconds_over(ends_s: list[float], total_s: float, over: Mask) -> np.ndarray:
    """For each place the seconds before it at which the plan is over its budget."""
    seconds = np.diff(np.array([0.0, *ends_s]))
    return np.concatenate([[0.0], np.cumsum(np.where(over, seconds, 0.0))])


def _most(over: Ints) -> int:
    return int(over.max(initial=-1))
