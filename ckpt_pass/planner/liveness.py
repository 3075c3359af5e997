"""The simulator: exact bytes over time of a step that saves and drops given values.

The rules are those of the graphs that really run (``docs/design.md``): the order is that of
:mod:`ckpt_pass.planner.schedule`; a storage is freed after its last use, or after its last use
before it is made again; saved storages live from the forward on, gradients and the forward's
outputs to the end; the caller holds the latter, so that one that is recomputed is there twice; in
the backward an elementwise op writes over what it reads for the last time, if the backward has made
it. A storage that is moved (:mod:`ckpt_pass.planner.moves`) takes nothing from its release to its
fetch; what was fetched is never written over. It is a difference array over instances of storages,
summed once, so that a step of 3,500 ops takes a millisecond.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckpt_pass.planner.moves import Move, away_bytes
from ckpt_pass.planner.problem import Problem
from ckpt_pass.planner.schedule import Schedule
from ckpt_pass.planner.tables import Ints, Tables


@dataclass(frozen=True)
class ScheduleBytes:
    """Bytes over a simulated step, above what was allocated when it began.

    Attributes:
        bytes_at: bytes while each op of the schedule runs, forward then backward.
        forward_length: how many of them belong to the forward.
    """

    bytes_at: tuple[int, ...]
    forward_length: int

    @property
    def peak_bytes(self) -> int:
        """The most bytes at any moment."""
        return max(self.bytes_at, default=0)

    @property
    def peak_index(self) -> int:
        """The place in the schedule where the peak is first reached."""
        return self.bytes_at.index(self.peak_bytes) if self.bytes_at else 0

    @property
    def peak_in_backward(self) -> bool:
        """Whether the peak is reached in the backward."""
        return self.peak_index >= self.forward_length


@dataclass(frozen=True)
class MemoryProfile(ScheduleBytes):
    """The curve of a step, and the step.

    Attributes:
        schedule: the ops in the order in which they run, forward then backward.
        saved_bytes: bytes between forward and backward, the forward's outputs included; what is
            moved is not there then.
    """

    schedule: tuple[int, ...]
    saved_bytes: int


def simulate(problem: Problem, steps: Schedule, moves: Sequence[Move] = ()) -> MemoryProfile:
    """Run a step in thought.

    Args:
        problem: the step.
        steps: what it saves, and the order in which it runs.
        moves: what leaves the device and comes back, as
            :func:`~ckpt_pass.planner.moves.check_moves` accepts it.

    Returns:
        Exact bytes over time, under the rules above.
    """
    tables = Tables.of(problem)
    held = crossing(problem, steps)
    outputs = set(problem.forward_outputs)
    states = random_states(problem, steps)
    forward = lives(problem, steps.forward, (), held | outputs, held=(), overwrite=False)
    state_bytes = sum(states.values())
    at_forward = forward.bytes_at.copy()
    for index, nbytes in states.items():
        at_forward[steps.forward.index(index) :] += nbytes
    at_backward = backward_lives(problem, steps).bytes_at.copy()
    for index, nbytes in states.items():
        runs = [place for place, other in enumerate(steps.backward) if other == index]
        at_backward[: runs[-1] + 1] += nbytes
        at_backward[runs] += nbytes  # the present state, put back afterwards
    saved_bytes = int(tables.sizes[list(held | outputs)].sum()) + state_bytes
    if moves:
        away = away_bytes(problem, steps, moves)
        at_forward -= away[0]
        at_backward -= away[1]
        saved_bytes -= sum(problem.storage_bytes[move.storage] for move in moves)
    return MemoryProfile(
        bytes_at=(*at_forward.tolist(), *at_backward.tolist()),
        schedule=(*steps.forward, *steps.backward),
        forward_length=len(steps.forward),
        saved_bytes=saved_bytes,
    )


def backward_lives(problem: Problem, steps: Schedule) -> Lives:
    """What is alive when in the backward of a step; random states are not among it."""
    there, kept = crossing(problem, steps), problem.output_storages
    return lives(problem, steps.backward, there, kept, steps.transient)


def crossing(problem: Problem, steps: Schedule) -> set[int]:
    """The storages that are saved."""
    return {storage for index in steps.saved for storage in problem.ops[index].holds}


def random_states(problem: Problem, steps: Schedule) -> dict[int, int]:
    """Bytes of the random state that the forward saves for each op that draws again."""
    random = {i for i in steps.forward if problem.ops[i].random_state_bytes}
    return {i: problem.ops[i].random_state_bytes for i in sorted(random & set(steps.backward))}


@dataclass(frozen=True)
class Lives:
    """Instances of storages along a schedule: a storage that is made again is another instance.

    Attributes:
        storage: of each instance.
        first, last: places of its first and last use.
        begins, ends: where its bytes are counted; places, the last one included.
        made: whether it is made along the schedule, at ``first``.
        bytes_at: bytes while each op runs.
        counted: whether its bytes are counted: it is made, or is there when the schedule begins.
        throughout: storages that are there all the time besides.
        overwritten: instances whose memory an op takes at their last use; one a place counts.
    """

    storage: Ints
    first: Ints
    last: Ints
    begins: Ints
    ends: Ints
    made: NDArray[np.bool_]
    bytes_at: Ints
    counted: NDArray[np.bool_]
    throughout: Ints
    overwritten: Ints


def lives(
    problem: Problem,
    order: Sequence[int],
    there: Collection[int],
    kept: Iterable[int],
    transient: Collection[tuple[int, int]] = (),
    *,
    held: Collection[int] | None = None,
    earlier: Collection[int] = (),
    overwrite: bool = True,
) -> Lives:
    """Follow the storages along a schedule.

    Args:
        problem: the step.
        order: the ops, in the order in which they run.
        there: storages that are there at the beginning.
        kept: storages that stay to the end; of several instances the last one.
        transient: outputs that go at once (:class:`ckpt_pass.planner.schedule.Schedule`).
        held: storages that are there throughout, since the caller has them (in a backward those
            of the problem); where the schedule makes one, that is another instance.
        earlier: those of ``there`` that an earlier part of the same schedule has made.
        overwrite: whether results take the memory of what is read for the last time
            (:attr:`ckpt_pass.planner.problem.Op.overwrites`).
    """
    tables, length = Tables.of(problem), len(order)
    place, storage, made, over = tables.events(np.asarray(order, dtype=np.int64))
    extra = np.zeros(length + 1, dtype=np.int64)
    if transient:
        gone = set(transient)
        flags = [m and (p, s) in gone for p, s, m in zip(place, storage, made, strict=True)]
        hit = np.array(flags, dtype=bool)
        np.add.at(extra, place[hit], tables.sizes[storage[hit]])
        place, storage, made, over = place[~hit], storage[~hit], made[~hit], over[~hit]
    by_storage = np.argsort(storage, kind="stable")  # places stay in order
    place, storage, made = place[by_storage], storage[by_storage], made[by_storage]
    starts = made.copy()
    starts[1:] |= storage[1:] != storage[:-1]
    starts[:1] = True
    heads = np.flatnonzero(starts)
    first, found = place[heads], storage[heads]
    tails = np.append(heads[1:], len(place)) - 1 if len(heads) else heads
    last, is_made = place[tails], made[heads]
    present = np.zeros(len(tables.sizes), dtype=bool)
    present[list(there)] = True
    outside = np.zeros(len(tables.sizes), dtype=bool)
    outside[list(problem.held if held is None else held)] = True
    present |= outside
    stays = np.zeros(len(tables.sizes), dtype=bool)
    stays[list(kept)] = True
    before = np.zeros(len(tables.sizes), dtype=bool)
    before[list(earlier)] = True
    final = np.ones(len(heads), dtype=bool)
    final[:-1] = found[1:] != found[:-1]
    begins = np.where(is_made, first, 0)
    to_end = (stays[found] & final) | (outside[found] & ~is_made)
    ends = np.where(to_end, length - 1, last)
    counted = is_made | present[found]
    counts = counted.astype(np.int64) * tables.sizes[found]
    change = np.zeros(length + 1, dtype=np.int64)
    np.add.at(change, begins, counts)
    np.add.at(change, ends + 1, -counts)
    idle, apart = present & stays, outside.copy()
    idle[found] = apart[found[~is_made]] = False
    throughout = np.flatnonzero(idle | apart)
    constant = int(tables.sizes[throughout].sum())
    overwritten = np.zeros(0, dtype=np.int64)
    if length:
        workspace = tables.workspace[np.asarray(order, dtype=np.int64)]
        bytes_at = np.cumsum(change)[:-1] + extra[:-1] + constant + workspace
        over = over[by_storage]
        if overwrite and over.any():
            instance = np.cumsum(starts) - 1
            own = (is_made | before[found]) & ~stays[found]
            taken = over & own[instance] & (last[instance] == place)
            saving = np.zeros(length, dtype=np.int64)
            saving[place[taken]] = tables.sizes[storage[taken]]  # of several inputs one is taken
            overwritten = instance[taken]
            bytes_at -= saving
    else:
        bytes_at = np.zeros(0, dtype=np.int64)
    return Lives(
        found, first, last, begins, ends, is_made, bytes_at, counted, throughout, overwritten
    )
