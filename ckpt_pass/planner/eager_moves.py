"""What an eager step moves: saved values that leave the device and come back, followed exactly.

Inside a module that moves, nothing runs again. What autograd saves there begins to be copied away
when it is saved, and its memory is let go of when so many more have followed, or at the module's
end. It comes back for the backward's op that asks for it, or ahead of that: whenever a value is
asked for, the ones saved before it are fetched. Of a region whose arguments move these go when it
begins, and come back when it runs again; then the values of the module before are fetched. All of
this depends on the order of the step alone (:class:`ckpt_pass.offloading.window.Window` does it),
so that it can be followed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ckpt_pass.planner.clock import Transfer
from ckpt_pass.planner.eager_parts import EagerPlan, EagerRegion, SavedValue
from ckpt_pass.planner.link import Link
from ckpt_pass.planner.queues import Copies, copies_in, copies_out

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Leaving:
    """A storage that goes: when its copy is begun, and the moment from which it is let go of."""

    storage: int
    put: int
    released: int


@dataclass(slots=True)
class Stay:
    """A storage's memory taken again in the backward, by places.

    Attributes:
        storage: which.
        fetched: the place from which its memory is there.
        first: that of the op that asks for it.
        end: that from which it is not there any more.
    """

    storage: int
    fetched: int
    first: int
    end: int


@dataclass(frozen=True)
class Journeys:
    """What is moved in a step.

    Attributes:
        leaving: in the order in which it goes.
        stays: in the order in which it is asked for.
    """

    leaving: list[Leaving] = field(default_factory=list)
    stays: list[Stay] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Ask:
    """The backward asks for values of one module, and others are fetched ahead.

    Attributes:
        turn: the how manyth time that it asks for anything.
        storages: what it asks for, and the place up to which each is held.
        at: the place.
        then: the place at which others are fetched.
        number: how many values of the module had been put when the one asked for had been.
        shared: whether a value that an earlier ask has brought is taken, if it is there.
    """

    turn: int
    storages: tuple[tuple[int, int], ...]
    at: int
    then: int
    number: int
    shared: bool


@dataclass(frozen=True, slots=True)
class Window:
    """The values of one run of a module (:class:`ckpt_pass.offloading.window.Window`).

    Attributes:
        puts: storages, and the moments at which they are put.
        end: the moment at which all that is on its way is waited for.
        asks: in no order.
        last_first: whether the backward asks for the last of them first.
    """

    puts: tuple[tuple[int, int], ...]
    end: int
    asks: tuple[Ask, ...]
    last_first: bool


def windows_of(
    regions: Sequence[EagerRegion],
    values: Sequence[SavedValue],
    plan: EagerPlan,
    place_of: Ints,
    starts: Ints,
) -> list[Window]:
    """What a plan's modules put away, in the order in which they begin.

    Args:
        regions, values: of the step.
        plan: what moves.
        place_of: the place in the simulated step of a moment of the record.
        starts: the place at which each region begins to run again, where it does.
    """
    found = []
    for index in sorted(plan.moved | plan.sends, key=lambda index: regions[index].ops):
        region = regions[index]
        if index in plan.moved:
            found.append(_of_saved(region, values, place_of))
        else:
            found.append(_of_arguments(region, values, place_of, int(starts[index])))
    return found


def _of_saved(region: EagerRegion, values: Sequence[SavedValue], place_of: Ints) -> Window:
    goes = [(values[number], at) for number, at in _puts(region, values)]
    puts = tuple((value.storage, at) for value, at in goes)
    asks = []
    for number, (value, _) in enumerate(goes, start=1):
        at, end = int(place_of[value.asked_at]), int(place_of[value.released])
        asks.append(Ask(value.turn, ((value.storage, end),), at, at, number, shared=True))
    return Window(puts, region.ops[1], tuple(asks), last_first=True)


def _puts(region: EagerRegion, values: Sequence[SavedValue]) -> Iterator[tuple[int, int]]:
    """The values that go, in their order, and when each is put.

    As :meth:`ckpt_pass.offloading.saved_hooks.SavedHooks.pack` does it.
    """
    moves = frozenset(region.moves)
    waiting: list[int] = []
    node = -1
    for number in range(*region.values):
        value = values[number]
        if waiting and value.node != node:
            yield from ((one, value.saved_at) for one in waiting)
            waiting = []
        if number in moves and value.waits:
            waiting.append(number)
            node = value.node
        elif number in moves:
            yield number, value.saved_at
    yield from ((one, region.ops[1]) for one in waiting)


def _of_arguments(
    region: EagerRegion, values: Sequence[SavedValue], place_of: Ints, start: int
) -> Window:
    rerun_ends = start + region.needed
    ends = dict.fromkeys(region.sent, rerun_ends)
    inside = [values[number] for number in range(*region.values)]
    for value in inside:
        if value.storage in ends:
            released = int(place_of[value.released if value.asked else region.done])
            ends[value.storage] = max(ends[value.storage], released)
    puts = tuple((storage, region.ops[0]) for storage in region.sent)
    turn = min(value.turn for value in inside if value.asked)
    ask = Ask(turn, tuple(ends.items()), start, rerun_ends, len(puts), shared=False)
    return Window(puts, region.ops[1], (ask,), last_first=False)


def journeys(windows: Sequence[Window], in_flight: int, ahead: int) -> Journeys:
    """Follow what moves.

    Args:
        windows: in the order in which they begin.
        in_flight: how many values of each may be on their way.
        ahead: how many are fetched before they are asked for.
    """
    found = Journeys()
    gone: set[int] = set()
    for window in windows:
        new = []
        for storage, put in window.puts:
            if storage not in gone:
                gone.add(storage)
                new.append((storage, put))
        for index, (storage, put) in enumerate(new):
            later = index + in_flight
            released = new[later][1] if later < len(new) else window.end
            found.leaving.append(Leaving(storage, put, released))
    _come_back(found, windows, ahead)
    return found


def _come_back(found: Journeys, windows: Sequence[Window], ahead: int) -> None:
    taken: set[int] = set()
    fetched: dict[int, int] = {}
    latest: dict[int, Stay] = {}
    asks = [(ask, index) for index, window in enumerate(windows) for ask in window.asks]
    for ask, index in sorted(asks, key=lambda item: item[0].turn):
        for storage, end in ask.storages:
            stay = latest.get(storage) if ask.shared else None
            if stay is not None and ask.at < stay.end:
                stay.end = max(stay.end, end)
            else:
                begin = ask.at if storage in taken else fetched.get(storage, ask.at)
                stay = Stay(storage, begin, ask.at, max(end, ask.at + 1))
                found.stays.append(stay)
                if ask.shared:
                    latest[storage] = stay
            taken.add(storage)
        for other in _next_ones(windows, index, ask, taken, ahead):
            fetched.setdefault(other, ask.then)


def _next_ones(
    windows: Sequence[Window], index: int, ask: Ask, taken: set[int], ahead: int
) -> Iterator[int]:
    """What is fetched once something was asked for."""
    if windows[index].last_first:
        missing = ahead
        for storage, _ in windows[index].puts[: ask.number - 1][::-1]:
            if not missing:
                return
            if storage not in taken:
                yield storage
                missing -= 1
        if not missing:
            return
    yield from _of_those_before(windows, index, taken, ahead)


def _of_those_before(
    windows: Sequence[Window], index: int, taken: set[int], ahead: int
) -> Iterator[int]:
    """What the module before is asked for first; where that is too little, those before it."""
    while index:
        index -= 1
        missing, last_first = ahead, windows[index].last_first
        for storage, _ in windows[index].puts[:: -1 if last_first else 1]:
            if not missing:
                return
            if storage not in taken:
                yield storage
                missing -= 1
        if not missing or not last_first:
            return


@dataclass(frozen=True)
class Copying:
    """The copies of a step, by the clock.

    Attributes:
        out, back: the copies each way, in the order of the journeys.
        out_s, in_s: seconds of each.
        forward_s: of the forward, with what it waits.
    """

    out: Copies
    back: Copies
    out_s: list[float]
    in_s: list[float]
    forward_s: float

    @property
    def stall_s(self) -> float:
        """What ops wait for copies."""
        return self.out.stall_s + self.back.stall_s


def copying(
    moved: Journeys, nbytes: Ints, times_s: Floats, backward_begins: int, link: Link
) -> Copying:
    """Run the copies of a step beside its ops, by the clock.

    Args:
        moved: what moves.
        nbytes: of each storage.
        times_s: of the op at each place.
        backward_begins: the place of the first one after the forward.
        link: what moves it.
    """
    forward, backward = times_s[:backward_begins], times_s[backward_begins:]
    ends_s, starts_s = np.cumsum(forward), np.cumsum(backward) - backward
    leaving, stays = moved.leaving, moved.stays
    out_s = [link.out_s(int(nbytes[one.storage])) for one in leaving]
    in_s = [link.in_s(int(nbytes[one.storage])) for one in stays]
    made = [max(one.put - 1, 0) for one in leaving]
    released = [max(one.released - 1, 0) for one in leaving]
    out = copies_out(ends_s.tolist(), made, released, out_s)
    last = len(backward) - 1
    fetched = [min(max(one.fetched - backward_begins, 0), last) for one in stays]
    first = [min(max(one.first - backward_begins, 0), last) for one in stays]
    back = copies_in(starts_s.tolist(), fetched, first, in_s)
    return Copying(out, back, out_s, in_s, float(forward.sum()) + out.stall_s)


def transfers(
    moved: Journeys,
    found: Copying,
    nbytes: Ints,
    times_s: Floats,
    backward_begins: int,
) -> tuple[Transfer, ...]:
    """Each storage on its way; of one that is asked for again later, the first time."""
    backward = times_s[backward_begins:]
    starts_s = np.cumsum(backward) - backward
    for place, wait_s in found.back.waits:
        starts_s[place:] += wait_s
    row_of: dict[int, int] = {}
    for row, stay in enumerate(moved.stays):
        row_of.setdefault(stay.storage, row)
    ways = []
    for k, one in enumerate(moved.leaving):
        row = row_of[one.storage]
        first = min(max(moved.stays[row].first - backward_begins, 0), len(backward) - 1)
        ways.append(
            Transfer(
                storage=one.storage,
                nbytes=int(nbytes[one.storage]),
                out_start_s=found.out.start_s[k],
                out_end_s=found.out.end_s[k],
                released_s=found.out.memory_s[k],
                fetched_s=found.forward_s + found.back.memory_s[row],
                in_start_s=found.forward_s + found.back.start_s[row],
                in_end_s=found.forward_s + found.back.end_s[row],
                used_s=found.forward_s + float(starts_s[first]),
            )
        )
    return tuple(ways)
