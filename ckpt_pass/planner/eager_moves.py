"""What an eager step moves: saved values that leave the device and come back, followed exactly.

Inside a module that moves, nothing runs again. What autograd saves there begins to be copied away
when it is saved, and its memory is let go of when so many more have followed, or at the module's
end. It comes back for the backward's op that asks for it, or ahead of that: whenever a value is
asked for, the ones saved before it are fetched. All of this depends on the order of the step alone
(:class:`ckpt_pass.offloading.window.Window` does it), so that it can be followed here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ckpt_pass.planner.clock import Transfer
from ckpt_pass.planner.eager_parts import SavedValue
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


@dataclass(frozen=True)
class MovingModule:
    """A module that moves: its values in their order, and the moment of its end."""

    values: Sequence[SavedValue]
    end: int


def journeys(
    modules: Iterable[MovingModule], in_flight: int, ahead: int, place_of: Callable[[int], int]
) -> Journeys:
    """Follow what moves.

    Args:
        modules: those that move, in the order in which they run.
        in_flight: how many values may be on their way.
        ahead: how many are fetched before they are asked for.
        place_of: the place in the simulated step of a moment of the record.
    """
    found = Journeys()
    windows: list[list[int]] = []
    asking: list[tuple[int, int, int, SavedValue]] = []
    gone: set[int] = set()
    for module in modules:
        new: list[SavedValue] = []
        storages = []
        for value in module.values:
            storages.append(value.storage)
            asking.append((value.turn, len(windows), len(storages), value))
            if value.storage not in gone:
                gone.add(value.storage)
                new.append(value)
        for index, value in enumerate(new):
            later = index + in_flight
            released = new[later].saved_at if later < len(new) else module.end
            found.leaving.append(Leaving(value.storage, value.saved_at, released))
        windows.append(storages)
    asking.sort(key=lambda item: item[:3])
    _come_back(found, windows, asking, ahead, place_of)
    return found


def _come_back(
    found: Journeys,
    windows: list[list[int]],
    asking: Sequence[tuple[int, int, int, SavedValue]],
    ahead: int,
    place_of: Callable[[int], int],
) -> None:
    taken: set[int] = set()
    fetched: dict[int, int] = {}
    latest: dict[int, Stay] = {}
    for _, window, number, value in asking:
        storage, at, end = value.storage, place_of(value.asked_at), place_of(value.released)
        stay = latest.get(storage)
        if stay is not None and at < stay.end:
            stay.end = max(stay.end, end)
        else:
            begin = at if storage in taken else fetched.get(storage, at)
            stay = latest[storage] = Stay(storage, begin, at, max(end, at + 1))
            found.stays.append(stay)
        taken.add(storage)
        for other in _earlier(windows, window, number, taken, ahead):
            fetched.setdefault(other, at)


def _earlier(
    windows: list[list[int]], window: int, number: int, taken: Collection[int], ahead: int
) -> Iterable[int]:
    """What is fetched when the ``number``-th value of a module, from 1, was asked for."""
    missing = ahead
    while True:
        for index in range(number - 2, -1, -1):
            if not missing:
                return
            if windows[window][index] not in taken:
                yield windows[window][index]
                missing -= 1
        if not missing or not window:
            return
        # The module before is asked for as many as there may be at once, however many are missing.
        window, missing = window - 1, ahead
        number = len(windows[window]) + 1


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
