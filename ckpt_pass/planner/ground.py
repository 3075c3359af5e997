"""A plan that is to be made to fit by moving some of what it saves.

All that asks for a set of storages is on arrays here: which set covers what the plan has over the
budget, and how long the step takes then. The schedule stays as it is, so that a set is a mask.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ckpt_pass.planner.clock import op_times
from ckpt_pass.planner.link import Link
from ckpt_pass.planner.moves import Movable, Move
from ckpt_pass.planner.placing import fetched_at, released_at
from ckpt_pass.planner.problem import Problem
from ckpt_pass.planner.queues import copies_in, copies_out
from ckpt_pass.planner.solution import Solution, solution_of
from ckpt_pass.planner.tables import Ints

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Ground:
    """A plan without moves, beside a link.

    Attributes:
        problem: the step.
        plan: it has no moves.
        link: what may move its values.
    """

    problem: Problem
    plan: Solution
    link: Link

    @cached_property
    def rows(self) -> Movable:
        """What may be moved, in the order of the copies out."""
        return Movable.of(self.problem, self.plan.steps)

    @cached_property
    def must(self) -> Mask:
        """Of the rows those that are not left where they are."""
        return np.isin(self.rows.storage, list(self.problem.must_move))

    @cached_property
    def forward_bytes(self) -> Ints:
        """Bytes while each op of the forward runs."""
        return self._bytes[: len(self.plan.steps.forward)]

    @cached_property
    def backward_bytes(self) -> Ints:
        """Bytes while each op of the backward runs."""
        return self._bytes[len(self.plan.steps.forward) :]

    @cached_property
    def _bytes(self) -> Ints:
        return np.array(self.plan.profile.bytes_at, dtype=np.int64)

    @cached_property
    def ends_s(self) -> list[float]:
        """When each op of the forward ends, if nothing waits."""
        seconds = op_times(self.problem)[list(self.plan.steps.forward)]
        return [float(s) for s in np.cumsum(seconds)]

    @cached_property
    def starts_s(self) -> list[float]:
        """When each op of the backward begins, if nothing waits; the first one at 0."""
        seconds = op_times(self.problem)[list(self.plan.steps.backward)]
        return [float(s) for s in np.cumsum(seconds) - seconds]

    @cached_property
    def compute_s(self) -> float:
        """Seconds of all ops."""
        steps = self.plan.steps
        return float(op_times(self.problem)[[*steps.forward, *steps.backward]].sum())

    @cached_property
    def forward_s(self) -> float:
        """Seconds of the forward's ops."""
        return self.ends_s[-1] if self.ends_s else 0.0

    @cached_property
    def least_bytes(self) -> int:
        """The peak where all that may be moved is away for as long as it can be."""
        forward, backward = self.left(self.all_away, 0)
        return int(max(forward.max(initial=0), backward.max(initial=0)))

    @cached_property
    def all_away(self) -> Mask:
        """All that may be moved; if the other side is too small for it, the longest idle."""
        rows = self.rows
        if self.link.may_hold(int(rows.nbytes.sum())):
            return np.ones(len(rows), dtype=bool)
        taken = self.must.copy()
        room = (self.link.host_bytes or 0) - int(rows.nbytes[taken].sum())
        for row in np.argsort(rows.last - rows.first, kind="stable").tolist():
            if rows.nbytes[row] <= room and not taken[row]:
                taken[row] = True
                room -= int(rows.nbytes[row])
        return taken

    def left(self, mask: Mask, budget_bytes: int) -> tuple[Ints, Ints]:
        """Bytes above a budget if a set is away for as long as it can be, forward and backward."""
        rows = self.rows
        forward = np.zeros(len(self.forward_bytes) + 1, dtype=np.int64)
        np.add.at(forward, rows.last[mask] + 1, rows.nbytes[mask])
        backward = np.zeros(len(self.backward_bytes) + 1, dtype=np.int64)
        np.add.at(backward, rows.first[mask], rows.nbytes[mask])
        away = backward[::-1].cumsum()[::-1][1:]
        return (
            self.forward_bytes - budget_bytes - forward.cumsum()[:-1],
            self.backward_bytes - budget_bytes - away,
        )

    def covers(self, mask: Mask, budget_bytes: int) -> bool:
        """Whether the plan fits if a set is moved, on both sides of the link."""
        forward, backward = self.left(mask, budget_bytes)
        fits = forward.max(initial=0) <= 0 and backward.max(initial=0) <= 0
        return bool(fits) and self.link.may_hold(int(self.rows.nbytes[mask].sum()))

    def places(self, mask: Mask, budget_bytes: int) -> tuple[list[int], list[int]] | None:
        """Where a set is released and fetched (:mod:`ckpt_pass.planner.placing`)."""
        rows, over = self.rows, self.forward_bytes - budget_bytes
        last, first, nbytes = rows.last[mask], rows.first[mask], rows.nbytes[mask]
        released = released_at(over, last.tolist(), nbytes.tolist())
        fetched = fetched_at(self.backward_bytes - budget_bytes, first, nbytes)
        return None if released is None or fetched is None else (released, fetched)

    def step_time_s(self, mask: Mask, budget_bytes: int) -> float:
        """Seconds of the step if a set is moved; infinite if it does not fit then."""
        if not mask.any():
            fits = max(self.plan.profile.bytes_at, default=0) <= budget_bytes
            return self.compute_s if fits else float("inf")
        places = self.places(mask, budget_bytes)
        if places is None or not self.link.may_hold(int(self.rows.nbytes[mask].sum())):
            return float("inf")
        rows, link = self.rows, self.link
        nbytes = rows.nbytes[mask].tolist()
        out_s, in_s = [link.out_s(n) for n in nbytes], [link.in_s(n) for n in nbytes]
        out = copies_out(self.ends_s, rows.made[mask].tolist(), places[0], out_s)
        back = copies_in(self.starts_s, places[1], rows.first[mask].tolist(), in_s)
        return self.compute_s + out.stall_s + back.stall_s

    def mask_of(self, storages: Iterable[int]) -> Mask:
        """Those of some storages that may be moved here."""
        return np.isin(self.rows.storage, list(storages))

    def moves(self, mask: Mask, budget_bytes: int) -> tuple[Move, ...]:
        """A set as moves; it must cover what is over."""
        places = self.places(mask, budget_bytes)
        assert places is not None
        forward = self.plan.steps.forward
        rows = zip(self.rows.storage[mask].tolist(), *places, strict=True)
        return tuple(
            Move(storage, forward[released], fetched) for storage, released, fetched in rows
        )

    def solution(self, mask: Mask, budget_bytes: int, solver: str) -> Solution:
        """The plan with a set moved."""
        moves = self.moves(mask, budget_bytes) if mask.any() else ()
        return solution_of(self.problem, self.plan.steps, self.plan.drops, solver, moves, self.link)
