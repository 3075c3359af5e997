"""The eager step as a problem, and its exact simulation.

In eager mode autograd holds what its formulas need from an op's forward until its backward has
run. A checkpoint region holds its arguments instead; just before the first op of its backward it
runs again as a whole, up to the last value that the backward needs, and autograd holds what that
saves. What Python itself refers to lives until Python lets go, in both runs alike. A module may
also move: nothing of it runs again, and what autograd saves in it lies elsewhere until the backward
asks for it (:mod:`ckpt_pass.planner.eager_moves`).

All that is recorded once, from a step without regions: moments count the ops that have begun.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ckpt_pass.planner.alive import Life
from ckpt_pass.planner.clock import Transfer
from ckpt_pass.planner.eager_lives import EagerLives, StateLife
from ckpt_pass.planner.eager_moves import (
    Copying,
    Journeys,
    copying,
    journeys,
    transfers,
    windows_of,
)
from ckpt_pass.planner.eager_parts import (
    EagerOp,
    EagerPlan,
    EagerRegion,
    EagerStorage,
    Microbatches,
    SavedValue,
)
from ckpt_pass.planner.link import Link

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class EagerProfile:
    """The simulated step.

    Attributes:
        bytes_at: while each op runs, recomputed ones included, in order.
        ops: which op runs at each of these places.
        backward_begins: the place of the first one after the forward.
        recompute_time_s: of what runs again, and of looking for what is kept.
        recompute_flops: of what runs again.
        away_bytes: the most at the other place.
        moved, copies: what moves, and its copies; ``None`` where nothing does.
    """

    bytes_at: Ints
    ops: Ints
    backward_begins: int
    recompute_time_s: float
    recompute_flops: int
    away_bytes: int = 0
    moved: Journeys | None = None
    copies: Copying | None = None

    @property
    def stall_s(self) -> float:
        """What ops wait for copies."""
        return self.copies.stall_s if self.copies is not None else 0.0

    @property
    def overhead_s(self) -> float:
        """What the step takes more than the plain one."""
        return self.recompute_time_s + self.stall_s

    @property
    def peak_bytes(self) -> int:
        """The most at any place."""
        return int(self.bytes_at.max()) if len(self.bytes_at) else 0

    @property
    def peak_index(self) -> int:
        """The first place of the peak."""
        return int(self.bytes_at.argmax())


@dataclass(frozen=True)
class EagerProblem:
    """A recorded step.

    Attributes:
        ops: in the order in which they ran, forward and backward.
        forward_length: how many of them are the forward.
        storages: what they allocate.
        values: what autograd saves, in order.
        regions: the candidates, each before those inside it.
        keeping_s: what it costs to look at one op of a region that keeps something, in both runs.
        link: what may move values; ``None`` where nothing can.
        in_flight: how many values of a module may be on their way out at once.
        away_unit: at the other place a value takes a multiple of so many bytes.
        microbatches: what lies in memory beside this one, where it is one of several.
    """

    ops: tuple[EagerOp, ...]
    forward_length: int
    storages: tuple[EagerStorage, ...]
    values: tuple[SavedValue, ...]
    regions: tuple[EagerRegion, ...]
    keeping_s: float = 0.0
    link: Link | None = None
    in_flight: int = 1
    away_unit: int = 1
    microbatches: Microbatches | None = None

    @cached_property
    def _table(self) -> _Table:
        return _Table(self)

    def simulate(self, plan: EagerPlan) -> EagerProfile:
        """Memory over the step under a plan."""
        return _simulate(self, self._table, plan)

    def rerun_ops(self, plan: EagerPlan) -> list[int]:
        """The ops that run again, in no order of time."""
        found = []
        for index in plan.regions:
            first = self.regions[index].ops[0]
            again = range(first, first + self.regions[index].needed)
            found += [op for op in again if op not in plan.kept]
        return found

    def transfers(self, profile: EagerProfile) -> tuple[Transfer, ...]:
        """What a simulated step moves, by the clock."""
        moved, copies = profile.moved, profile.copies
        if moved is None or copies is None:
            return ()
        table = self._table
        seconds, begins = table.seconds[profile.ops], profile.backward_begins
        return transfers(moved, copies, table.nbytes, seconds, begins)

    def alive(self, plan: EagerPlan) -> tuple[Life, ...]:
        """What is in memory when, as :meth:`simulate` counts it; not what lies beside the step."""
        return _follow(self, self._table, plan).alive(self.ops, self.storages)

    @property
    def step_time_s(self) -> float:
        """Modelled time of the step with nothing recomputed."""
        return sum(op.time_s for op in self.ops)


def _ints(found: Iterable[int]) -> Ints:
    return np.array(list(found), dtype=np.int64)


class _Table:
    """The problem as arrays."""

    def __init__(self, problem: EagerProblem) -> None:
        self.nbytes = _ints(s.nbytes for s in problem.storages)
        self.born = _ints(s.born for s in problem.storages)
        self.dies = _ints(s.dies for s in problem.storages)
        self.of_graph = np.array([s.of_graph for s in problem.storages], dtype=bool)
        self.shared = np.array([s.shared for s in problem.storages], dtype=bool)
        self.added = np.array([s.added for s in problem.storages], dtype=bool)
        known = [(i, v) for i, v in enumerate(problem.values) if v.storage >= 0]
        self.value_number = _ints(i for i, _ in known)
        self.value_storage = _ints(v.storage for _, v in known)
        self.released = _ints(v.released for _, v in known)
        self.asked = np.array([v.asked for _, v in known], dtype=bool)
        self.workspace = _ints(op.workspace_bytes for op in problem.ops)
        self.seconds = np.array([op.time_s for op in problem.ops], dtype=np.float64)


def _follow(problem: EagerProblem, table: _Table, plan: EagerPlan) -> EagerLives:
    chosen = sorted(plan.regions, key=lambda index: problem.regions[index].reruns)
    count = len(problem.ops)
    op_region = np.full(count + 1, -1, dtype=np.int64)
    value_region = np.full(len(problem.values) + 1, -1, dtype=np.int64)
    for index in chosen:
        region = problem.regions[index]
        op_region[slice(*region.ops)] = index
        value_region[slice(*region.values)] = index
    before_op, before_death, starts = _places(problem, chosen, count)
    goes = _goes(problem, plan)
    windows = windows_of(problem.regions, problem.values, plan, before_death, starts)
    moved = journeys(windows, problem.in_flight, plan.ahead)
    kept = np.zeros(len(problem.storages), dtype=bool)
    kept[[s for op in plan.kept for s in problem.ops[op].makes]] = True

    # First lives: as recorded, but what a region saves inside itself is not held.
    held_in = value_region[table.value_number]
    born_in = op_region[table.born]
    own = (held_in >= 0) & (born_in[table.value_storage] == held_in)
    ends = table.dies.copy()
    for index in chosen:
        dropped = list(problem.regions[index].dropped)
        ends[dropped] = np.minimum(ends[dropped], problem.regions[index].ops[1])
    free = ~own & (held_in < 0) & ~goes[table.value_number]
    for leaving in moved.leaving:
        ends[leaving.storage] = max(ends[leaving.storage], leaving.released)
    np.maximum.at(ends, table.value_storage[free], table.released[free])
    keeps = own & kept[table.value_storage]
    done = np.array([region.done for region in problem.regions] or [0], dtype=np.int64)
    taken = np.where(table.asked, table.released, done[held_in])
    np.maximum.at(ends, table.value_storage[keeps], taken[keeps])
    foreign = (held_in >= 0) & ~own & ~goes[table.value_number]
    np.maximum.at(ends, table.value_storage[foreign], done[held_in[foreign]])
    for index in chosen:
        region = problem.regions[index]
        arguments = list(region.arguments)
        if index in plan.sends:
            arguments = list({*arguments}.difference(region.sent))
        ends[arguments] = np.maximum(ends[arguments], problem.regions[index].done)
    end_places = before_death[ends]

    # Second lives: what a region makes again.
    again = (born_in >= 0) & ~kept
    length = int(before_op[count])
    begin2, end2, bytes2 = _second_lives(problem, table, again, born_in, starts)
    held = np.nonzero(table.of_graph[bytes2])[0]
    end2[held] = np.maximum(end2[held], before_death[done[born_in[bytes2[held]]]])
    order = np.full(len(problem.storages), -1, dtype=np.int64)
    order[bytes2] = np.arange(len(bytes2))
    unkept = own & ~kept[table.value_storage]
    where = order[table.value_storage[unkept]]
    there = where >= 0
    np.maximum.at(end2, where[there], before_death[taken[unkept][there]])
    for op in plan.kept:  # held for the recomputation that takes it, if not longer
        for storage in problem.ops[op].makes:
            region = problem.regions[int(op_region[op])]
            place = min(table.dies[storage] - region.ops[0], region.needed)
            taken_at = starts[int(op_region[op])] + place
            reached = op - region.ops[0] < region.needed  # what is not is held with the region
            at = taken_at if reached else before_death[region.done]
            end_places[storage] = max(end_places[storage], at)

    states: list[StateLife] = []
    for index in chosen:
        region = problem.regions[index]
        op, nbytes, at = region.ops[0], region.extra_bytes, starts[index]
        end = int(before_death[region.done])
        states.append(StateLife(op, nbytes, int(before_op[op]), end))
        # While it runs again, the program's own state waits beside it.
        states.append(StateLife(op, nbytes, at, at + region.needed))
    return EagerLives(
        begins=before_op[table.born],
        ends=end_places,
        again=bytes2,
        again_begins=begin2,
        again_ends=end2,
        states=tuple(states),
        keeping=frozenset(int(op_region[op]) for op in plan.kept),
        moved=moved,
        ran=_ran(problem, chosen, before_op, starts, length),
        forward_length=int(before_op[problem.forward_length]),
    )


def _simulate(problem: EagerProblem, table: _Table, plan: EagerPlan) -> EagerProfile:
    found = _follow(problem, table, plan)
    bytes_at = found.bytes_at(table.nbytes, table.workspace)
    moved, ran, begins = found.moved, found.ran, found.forward_length
    rerun = problem.rerun_ops(plan)
    looked_at = sum(problem.regions[index].needed for index in found.keeping)
    if problem.microbatches is not None:
        waits = (found.begins < begins) & (found.ends > begins) & ~table.shared
        states = sum(problem.regions[index].extra_bytes for index in plan.regions)
        each = int(table.nbytes[waits].sum()) + states
        left = _left(table, found.ends, len(ran))
        bytes_at = _with_others(problem.microbatches, bytes_at, each, left)
    copies = None
    if problem.link is not None and moved.leaving:
        copies = copying(moved, table.nbytes, table.seconds[ran], begins, problem.link)
    unit = problem.away_unit
    return EagerProfile(
        bytes_at,
        ran,
        begins,
        sum(problem.ops[op].time_s for op in rerun) + looked_at * problem.keeping_s,
        sum(problem.ops[op].flops for op in rerun),
        sum(-(-int(table.nbytes[one.storage]) // unit) * unit for one in moved.leaving),
        moved if copies is not None else None,
        copies,
    )


def _left(table: _Table, ends: Ints, length: int) -> Ints:
    """Bytes of the gradients of a first microbatch that a later one has let go of."""
    delta = np.zeros(length + 2, dtype=np.int64)
    np.add.at(delta, ends[table.added], table.nbytes[table.added])
    found: Ints = np.cumsum(delta)[:length]
    return found


def _with_others(beside: Microbatches, bytes_at: Ints, each: int, left: Ints) -> Ints:
    """The most of a first microbatch and of later ones, at each place.

    Args:
        beside: what lies beside them.
        bytes_at: of a later one alone.
        each: what one holds from forward to backward.
        left: what the first has made by then that a later one only adds.
    """
    first = bytes_at + left + (beside.first - 1) * each
    later = bytes_at + beside.held_bytes + (beside.later - 1) * each
    most: Ints = np.maximum(first, later) + beside.passed_bytes
    return most


def _goes(problem: EagerProblem, plan: EagerPlan) -> npt.NDArray[np.bool_]:
    """Which of the saved values nobody holds meanwhile, since they move."""
    goes = np.zeros(len(problem.values) + 1, dtype=bool)
    for index in plan.moved:
        goes[list(problem.regions[index].moves)] = True
    for index in plan.sends:
        region = problem.regions[index]
        goes[[n for n in range(*region.values) if problem.values[n].storage in region.sent]] = True
    return goes


def _places(
    problem: EagerProblem, chosen: list[int], count: int
) -> tuple[Ints, Ints, dict[int, int]]:
    """Where each op stands once reruns are put in, where a death at each moment falls, and where
    each rerun begins.

    A death at a moment comes before the reruns that begin there.
    """
    inserted = np.zeros(count + 2, dtype=np.int64)
    starts = {}
    total = 0
    for index in chosen:
        region = problem.regions[index]
        starts[index] = region.reruns + total
        total += region.needed
        inserted[region.reruns] += region.needed
    moments = np.arange(count + 1)
    up_to = np.cumsum(inserted[: count + 1])
    before = up_to - inserted[: count + 1]
    places = moments + up_to
    places[count] = count + total
    deaths = moments + before
    deaths[count] = count + total
    return places, deaths, starts


def _second_lives(
    problem: EagerProblem,
    table: _Table,
    again: npt.NDArray[np.bool_],
    born_in: Ints,
    starts: dict[int, int],
) -> tuple[Ints, Ints, Ints]:
    """Begin, end (as far as Python goes) and storage of what is made a second time."""
    which = np.nonzero(again)[0]
    if not len(which):
        empty = np.zeros(0, dtype=np.int64)
        return empty, empty.copy(), empty.copy()
    size = len(problem.regions)
    first, needed, start = (np.zeros(size, dtype=np.int64) for _ in range(3))
    for index, at in starts.items():
        first[index] = problem.regions[index].ops[0]
        needed[index] = problem.regions[index].needed
        start[index] = at
    region = born_in[which]
    offset = table.born[which] - first[region]
    runs = offset < needed[region]
    which, region, offset = which[runs], region[runs], offset[runs]
    ends = np.minimum(table.dies[which] - first[region], needed[region])
    return start[region] + offset, start[region] + ends, which


def _ran(
    problem: EagerProblem, chosen: list[int], before_op: Ints, starts: dict[int, int], length: int
) -> Ints:
    """Which op runs at each place."""
    ran = np.zeros(length, dtype=np.int64)
    ran[before_op[:-1]] = np.arange(len(problem.ops))
    for index in chosen:
        region = problem.regions[index]
        first = region.ops[0]
        ran[starts[index] : starts[index] + region.needed] = np.arange(first, first + region.needed)
    return ran
