"""Moves: saved storages that leave the device after the forward's last use, and come back.

A moved storage is a saved one. Its copy out is started right after the op that makes it; the
device's memory is free once that copy has been waited for, and taken again when the copy in is
started. What the other ops read, and when, stays as it is: a plan with moves has the same schedule
as the plan without them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ckpt_pass._errors import CkptPassError
from ckpt_pass.planner.problem import Problem
from ckpt_pass.planner.schedule import Schedule
from ckpt_pass.planner.tables import Ints, Tables


class InvalidMoveError(CkptPassError):
    """A storage cannot be moved, or not at the places given."""


@dataclass(frozen=True, order=True)
class Move:
    """One storage that leaves the device, and when; its copy out is started when it is made.

    All ops whose saved results hold the storage move with it.

    Attributes:
        storage: its index in :attr:`~ckpt_pass.planner.problem.Problem.storage_bytes`.
        released_after: the op of the forward (its index in the problem; the forward runs it once)
            after which the copy out is waited for, and the device's memory is free. No op of the
            forward that touches the storage runs later.
        fetched_before: a place in :attr:`~ckpt_pass.planner.schedule.Schedule.backward`: right
            before the op at this place the device's memory is taken and the copy in is started. It
            is waited for before the first op at or after that place that touches the storage,
            which is the first one in the backward.
    """

    storage: int
    released_after: int
    fetched_before: int


@dataclass(frozen=True)
class Movable:
    """The storages that a schedule may move, in the order in which they are made.

    Attributes:
        storage, nbytes: of each.
        made, last: places in the forward: of the op that makes it, and of its last use.
        first, end: places in the backward of its first and of its last use.
    """

    storage: Ints
    nbytes: Ints
    made: Ints
    last: Ints
    first: Ints
    end: Ints

    @classmethod
    def of(cls, problem: Problem, steps: Schedule) -> Movable:
        """What a schedule may move: saved storages that the forward makes and the backward reads.

        Not among them: what the caller has, gradients, what is named in
        :attr:`~ckpt_pass.planner.problem.Problem.immovable`, and what the backward makes again
        before it reads it.
        """
        tables = Tables.of(problem)
        count = len(tables.sizes)
        place, storage, made, _ = tables.events(np.asarray(steps.forward, dtype=np.int64))
        last, made_at = np.full(count, -1), np.full(count, -1)
        last[storage] = place  # of several places the last one counts
        made_at[storage[made]] = place[made]
        place, storage, made, _ = tables.events(np.asarray(steps.backward, dtype=np.int64))
        if steps.transient:
            gone = [p * count + s for p, s in steps.transient]
            stays = ~(made & np.isin(place * count + storage, gone))
            place, storage, made = place[stays], storage[stays], made[stays]
        first, again = np.full(count, -1), np.zeros(count, dtype=bool)
        first[storage[::-1]] = place[::-1]
        again[storage[::-1]] = made[::-1]
        end = np.full(count, -1)
        end[storage] = place
        may = np.zeros(count, dtype=bool)
        may[[s for index in steps.saved for s in problem.ops[index].holds]] = True
        may[[*problem.held, *problem.output_storages, *problem.immovable]] = False
        may &= (tables.sizes > 0) & (made_at >= 0) & (first >= 0) & ~again
        found = np.flatnonzero(may)
        found = found[np.argsort(made_at[found], kind="stable")]
        columns = (tables.sizes, made_at, last, first, end)
        return cls(found, *(column[found] for column in columns))

    def __len__(self) -> int:
        return len(self.storage)

    def tightest(self, steps: Schedule, chosen: Collection[int] | None = None) -> tuple[Move, ...]:
        """Moves that are away as long as can be: the least bytes, and the most waiting.

        Args:
            steps: the schedule.
            chosen: storages among those that may move; all of them where ``None``.
        """
        rows = zip(self.storage.tolist(), self.last.tolist(), self.first.tolist(), strict=True)
        return tuple(
            Move(storage, steps.forward[last], first)
            for storage, last, first in rows
            if chosen is None or storage in chosen
        )


def check_moves(problem: Problem, steps: Schedule, moves: Sequence[Move]) -> None:
    """Refuse what cannot be carried out.

    Raises:
        InvalidMoveError: a storage may not move, moves twice, is released before its last use in
            the forward, or fetched after its first use in the backward.
    """
    if not moves:
        return
    known = Movable.of(problem, steps)
    row = {storage: k for k, storage in enumerate(known.storage.tolist())}
    place_of = {index: place for place, index in enumerate(steps.forward)}
    seen: set[int] = set()
    for move in moves:
        what = f"Storage {move.storage}{_maker(problem, move.storage)}"
        if move.storage not in row:
            raise InvalidMoveError(
                f"{what} cannot be moved, expected a saved storage of more than 0 bytes that the "
                "forward makes, that the backward reads, and that is neither an output nor "
                "immovable. Leave it out of the moves."
            )
        if move.storage in seen:
            raise InvalidMoveError(f"{what} is moved twice, expected one move a storage.")
        seen.add(move.storage)
        last, first = int(known.last[row[move.storage]]), int(known.first[row[move.storage]])
        if place_of.get(move.released_after, -1) < last:
            raise InvalidMoveError(
                f"{what} is released after op {move.released_after}, expected op "
                f"{steps.forward[last]}, its last use in the forward, or a later op of the forward."
            )
        if not 0 <= move.fetched_before <= first:
            raise InvalidMoveError(
                f"{what} is fetched before place {move.fetched_before} of the backward, expected "
                f"0 to {first}, its first use there."
            )


def in_problem(moves: Sequence[Move], steps: Schedule, count: int) -> tuple[Move, ...]:
    """Moves of a problem with ops added at the end of its forward, as those of the first ``count``.

    What is released after an added op (:func:`ckpt_pass.planner.problem.with_waiting`) is released
    at the end of the forward.

    Args:
        moves: of the larger problem.
        steps: the schedule of the smaller one.
        count: its ops.
    """
    return tuple(
        move if move.released_after < count else replace(move, released_after=steps.forward[-1])
        for move in moves
    )


def away_bytes(
    problem: Problem, steps: Schedule, moves: Sequence[Move]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Bytes that moves take off the device while each op runs: in the forward, in the backward."""
    place_of = {index: place for place, index in enumerate(steps.forward)}
    forward = np.zeros(len(steps.forward) + 1, dtype=np.int64)
    backward = np.zeros(len(steps.backward) + 1, dtype=np.int64)
    for move in moves:
        nbytes = problem.storage_bytes[move.storage]
        forward[place_of[move.released_after] + 1] += nbytes
        backward[0] += nbytes
        backward[move.fetched_before] -= nbytes
    return np.cumsum(forward)[:-1], np.cumsum(backward)[:-1]


def _maker(problem: Problem, storage: int) -> str:
    maker = problem.makers.get(storage)
    return "" if maker is None else f" ({problem.ops[maker].name})"
