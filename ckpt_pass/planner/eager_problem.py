"""The eager step as a problem, and its exact simulation.

In eager mode autograd holds what its formulas need from an op's forward until its backward has
run. A checkpoint region holds its arguments instead; just before the first op of its backward it
runs again as a whole, up to the last value that the backward needs, and autograd holds what that
saves. What Python itself refers to lives until Python lets go, in both runs alike.

All that is recorded once, from a step without regions: moments count the ops that have begun.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class EagerOp:
    """One op of the step.

    Attributes:
        name: its call site, in words.
        time_s, flops: modelled cost of running it.
        workspace_bytes: what its kernel needs besides its outputs.
        makes: the storages that it allocates.
        keepable: whether its outputs can be kept by a region that is recomputed.
        must_keep: whether a region must keep them: it must not run twice.
    """

    name: str
    time_s: float
    flops: int
    workspace_bytes: int
    makes: tuple[int, ...]
    keepable: bool = False
    must_keep: bool = False


@dataclass(frozen=True, slots=True)
class EagerStorage:
    """Memory that an op allocates.

    Attributes:
        nbytes: its size.
        born: the op that allocates it.
        dies: the moment from which only autograd may hold it (the end, where something else does).
        of_graph: whether autograd's graph holds it itself, in a region until that is done with.
    """

    nbytes: int
    born: int
    dies: int
    of_graph: bool = False


@dataclass(frozen=True, slots=True)
class SavedValue:
    """One value that autograd saves for the backward.

    Attributes:
        storage: what holds it; -1 where it existed before the step.
        released: the moment when autograd lets go.
        asked: whether the backward looks at it. A region that has made it again lets go of it then,
            and otherwise when it is done.
    """

    storage: int
    released: int
    asked: bool = True


@dataclass(frozen=True, slots=True)
class EagerRegion:
    """A module call that can be a checkpoint region.

    Attributes:
        name: FQN of the module.
        parent: the smallest region around it; -1 for none.
        ops: first op and the one after the last.
        values: first saved value and the one after the last.
        needed: how many of its ops run again: none after the last saved value.
        reruns: the backward's op before which it runs again.
        done: the moment when the last of its saved values is released.
        arguments: storages from outside that its ops use.
        extra_bytes: held besides (a random state).
        dropped: storages that it makes, which Python lets go at its end if it is one.
    """

    name: str
    parent: int
    ops: tuple[int, int]
    values: tuple[int, int]
    needed: int
    reruns: int
    done: int
    arguments: tuple[int, ...]
    extra_bytes: int = 0
    dropped: tuple[int, ...] = ()


@dataclass(frozen=True)
class EagerPlan:
    """What is checkpointed: regions that do not overlap, and the ops that they keep."""

    regions: frozenset[int] = frozenset()
    kept: frozenset[int] = frozenset()


@dataclass(frozen=True)
class EagerProfile:
    """The simulated step.

    Attributes:
        bytes_at: while each op runs, recomputed ones included, in order.
        ops: which op runs at each of these places.
        backward_begins: the place of the first one after the forward.
        recompute_time_s: of what runs again, and of looking for what is kept.
        recompute_flops: of what runs again.
    """

    bytes_at: Ints
    ops: Ints
    backward_begins: int
    recompute_time_s: float
    recompute_flops: int

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
    """

    ops: tuple[EagerOp, ...]
    forward_length: int
    storages: tuple[EagerStorage, ...]
    values: tuple[SavedValue, ...]
    regions: tuple[EagerRegion, ...]
    keeping_s: float = 0.0

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
        known = [(i, v) for i, v in enumerate(problem.values) if v.storage >= 0]
        self.value_number = _ints(i for i, _ in known)
        self.value_storage = _ints(v.storage for _, v in known)
        self.released = _ints(v.released for _, v in known)
        self.asked = np.array([v.asked for _, v in known], dtype=bool)
        self.workspace = _ints(op.workspace_bytes for op in problem.ops)


def _simulate(problem: EagerProblem, table: _Table, plan: EagerPlan) -> EagerProfile:
    chosen = sorted(plan.regions, key=lambda index: problem.regions[index].reruns)
    count = len(problem.ops)
    op_region = np.full(count + 1, -1, dtype=np.int64)
    value_region = np.full(len(problem.values) + 1, -1, dtype=np.int64)
    for index in chosen:
        region = problem.regions[index]
        op_region[slice(*region.ops)] = index
        value_region[slice(*region.values)] = index
    before_op, before_death, starts = _places(problem, chosen, count)
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
    free = ~own & (held_in < 0)
    np.maximum.at(ends, table.value_storage[free], table.released[free])
    keeps = own & kept[table.value_storage]
    done = np.array([region.done for region in problem.regions] or [0], dtype=np.int64)
    taken = np.where(table.asked, table.released, done[held_in])
    np.maximum.at(ends, table.value_storage[keeps], taken[keeps])
    foreign = (held_in >= 0) & ~own
    np.maximum.at(ends, table.value_storage[foreign], done[held_in[foreign]])
    for index in chosen:
        arguments = list(problem.regions[index].arguments)
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

    delta = np.zeros(length + 2, dtype=np.int64)
    np.add.at(delta, before_op[table.born], table.nbytes)
    np.add.at(delta, end_places, -table.nbytes)
    np.add.at(delta, begin2, table.nbytes[bytes2])
    np.add.at(delta, end2, -table.nbytes[bytes2])
    for index in chosen:
        region = problem.regions[index]
        delta[before_op[region.ops[0]]] += region.extra_bytes
        delta[before_death[region.done]] -= region.extra_bytes
        # While it runs again, the program's own state waits beside it.
        delta[starts[index]] += region.extra_bytes
        delta[starts[index] + region.needed] -= region.extra_bytes
    ran = _ran(problem, chosen, before_op, starts, length)
    bytes_at = np.cumsum(delta)[:length] + table.workspace[ran]
    rerun = problem.rerun_ops(plan)
    keeping = {int(op_region[op]) for op in plan.kept}
    looked_at = sum(problem.regions[index].needed for index in keeping)
    return EagerProfile(
        bytes_at,
        ran,
        int(before_op[problem.forward_length]),
        sum(problem.ops[op].time_s for op in rerun) + looked_at * problem.keeping_s,
        sum(problem.ops[op].flops for op in rerun),
    )


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
