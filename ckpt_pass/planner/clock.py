"""The clock: when each op and each copy of a step runs, on one compute queue and a link's queues.

Ops run one after the other. A copy out is issued when the op that makes its storage has run, and
runs when the copies issued before it are done; where a storage is released the compute queue waits
for its copy. A copy in is issued at its place in the backward, and the first op that reads the
storage waits for it. The other side holds a storage from the issue of its copy out to the end of
the wait for its copy in.

Every copy out is waited for in the forward, so that the backward begins with idle queues: how long
forward and backward take is told separately, and a link with one engine is as fast as one with two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckpt_pass.planner.link import Link
from ckpt_pass.planner.moves import Movable, Move
from ckpt_pass.planner.problem import Problem
from ckpt_pass.planner.queues import copies_in, copies_out
from ckpt_pass.planner.schedule import Schedule

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Transfer:
    """One storage on its way out and back; seconds from the beginning of the step.

    Attributes:
        storage, nbytes: what.
        out_start_s, out_end_s: of the copy out.
        released_s: the device's memory is free from here on.
        fetched_s: the device's memory is taken from here on; the copy in is issued.
        in_start_s, in_end_s: of the copy in.
        used_s: the first op of the backward that reads it begins.
    """

    storage: int
    nbytes: int
    out_start_s: float
    out_end_s: float
    released_s: float
    fetched_s: float
    in_start_s: float
    in_end_s: float
    used_s: float


@dataclass(frozen=True)
class Times:
    """What the clock says of a step.

    Attributes:
        step_time_s: of the whole step: compute, recomputation and waiting.
        compute_s: of all ops, those that run again included.
        forward_s: from the beginning to the end of the forward.
        out_stall_s, in_stall_s: that the compute queue waits for copies out, and for copies in.
        out_busy_s, in_busy_s: that copies of each direction take.
        host_peak_bytes: the most bytes on the other side.
        transfers: in the order of the copies out.
        starts_s: when each op of the schedule begins, forward then backward.
    """

    step_time_s: float
    compute_s: float
    forward_s: float
    out_stall_s: float
    in_stall_s: float
    out_busy_s: float
    in_busy_s: float
    host_peak_bytes: int
    transfers: tuple[Transfer, ...]
    starts_s: tuple[float, ...]

    @property
    def stall_s(self) -> float:
        """Seconds that the compute queue waits for copies."""
        return self.out_stall_s + self.in_stall_s

    @property
    def busy_s(self) -> float:
        """Seconds of all copies."""
        return self.out_busy_s + self.in_busy_s

    @property
    def hidden_share(self) -> float:
        """The share of the copies' time that no op waited for; 1 where nothing is moved."""
        return 1.0 if self.busy_s <= 0 else max(0.0, 1.0 - self.stall_s / self.busy_s)


def clock(problem: Problem, steps: Schedule, moves: Sequence[Move], link: Link) -> Times:
    """Run a step in thought, by the clock.

    Args:
        problem: the step; ``time_s`` of its ops.
        steps: the order in which it runs.
        moves: as :func:`~ckpt_pass.planner.moves.check_moves` accepts them.
        link: what moves them.
    """
    seconds = op_times(problem)
    forward, backward = seconds[list(steps.forward)], seconds[list(steps.backward)]
    rows = _rows(problem, steps, moves)
    out_s = [link.out_s(row.nbytes) for row in rows]
    in_s = [link.in_s(row.nbytes) for row in rows]
    ends_s, starts_s = np.cumsum(forward), np.cumsum(backward) - backward
    out = copies_out(ends_s.tolist(), [r.made for r in rows], [r.released for r in rows], out_s)
    back = copies_in(starts_s.tolist(), [r.fetched for r in rows], [r.first for r in rows], in_s)
    forward_s = float(forward.sum()) + out.stall_s
    for place, wait_s in out.waits:
        ends_s[place + 1 :] += wait_s
    for place, wait_s in back.waits:
        starts_s[place:] += wait_s
    starts_s += forward_s
    return Times(
        step_time_s=forward_s + float(backward.sum()) + back.stall_s,
        compute_s=float(forward.sum()) + float(backward.sum()),
        forward_s=forward_s,
        out_stall_s=out.stall_s,
        in_stall_s=back.stall_s,
        out_busy_s=sum(out_s),
        in_busy_s=sum(in_s),
        host_peak_bytes=sum(row.nbytes for row in rows),  # all are away between the halves
        transfers=tuple(
            Transfer(
                storage=row.storage,
                nbytes=row.nbytes,
                out_start_s=out.start_s[k],
                out_end_s=out.end_s[k],
                released_s=out.memory_s[k],
                fetched_s=forward_s + back.memory_s[k],
                in_start_s=forward_s + back.start_s[k],
                in_end_s=forward_s + back.end_s[k],
                used_s=float(starts_s[row.first]),
            )
            for k, row in enumerate(rows)
        ),
        starts_s=(*(ends_s - forward).tolist(), *starts_s.tolist()),
    )


def op_times(problem: Problem) -> Floats:
    """Seconds of each op, as an array; made once."""
    return problem.derived("times", lambda made: np.array([op.time_s for op in made.ops]))


@dataclass(frozen=True)
class _Row:
    """A move as places."""

    storage: int
    nbytes: int
    made: int
    released: int
    fetched: int
    first: int


def _rows(problem: Problem, steps: Schedule, moves: Sequence[Move]) -> list[_Row]:
    """In the order of the copies out: as they are made."""
    if not moves:
        return []
    known = Movable.of(problem, steps)
    move_of = {move.storage: move for move in moves}
    place_of = {index: place for place, index in enumerate(steps.forward)}
    columns = (known.storage, known.nbytes, known.made, known.first)
    return [
        _Row(
            storage,
            nbytes,
            made,
            place_of[move_of[storage].released_after],
            move_of[storage].fetched_before,
            first,
        )
        for storage, nbytes, made, first in zip(*(c.tolist() for c in columns), strict=True)
        if storage in move_of
    ]
