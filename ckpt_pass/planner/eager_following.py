"""Follow an eager step under a plan: what is in memory where, in arrays.

First lives are as recorded, and shorter where a region does not hold what autograd saves in it.
Second lives are of what regions make again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ckpt_pass.planner.eager_lives import EagerLives, StateLives
from ckpt_pass.planner.eager_moves import journeys, windows_of
from ckpt_pass.planner.eager_parts import EagerPlan
from ckpt_pass.planner.eager_shares import shares_of
from ckpt_pass.planner.eager_table import Ints, Regions, Table, ints


def follow(table: Table, plan: EagerPlan, forward_length: int, in_flight: int) -> EagerLives:
    """Where each storage is in memory under a plan.

    Args:
        table: the step.
        plan: what runs again, is kept, moves or is shared out.
        forward_length: how many of the ops are the forward.
        in_flight: how many values of a module may be on their way out at once.
    """
    regions = table.regions
    chosen = sorted(plan.regions, key=lambda index: table.candidates[index].reruns)
    numbers = ints(chosen)
    count = len(table.ops)
    op_region = np.full(count + 1, -1, dtype=np.int64)
    value_region = np.full(len(table.values) + 1, -1, dtype=np.int64)
    for index in chosen:
        region = table.candidates[index]
        op_region[slice(*region.ops)] = index
        value_region[slice(*region.values)] = index
    before_op, before_death, begun = _places(regions, numbers, count)
    goes = _goes(table, plan)
    windows = windows_of(table.candidates, table.values, plan, before_death, begun)
    moved = journeys(windows, in_flight, plan.ahead)
    keeps = _keepings(table, plan, op_region)
    kept = np.zeros(len(table.nbytes), dtype=bool)
    kept[keeps.storage] = True

    # First lives: as recorded, but what a region saves inside itself is not held.
    held_in = value_region[table.value_number]
    inside = held_in >= 0
    born_in = op_region[table.born]
    own = inside & (born_in[table.value_storage] == held_in)
    ends = table.dies.copy()
    for index in chosen:
        dropped = regions.dropped[index]
        ends[dropped] = np.minimum(ends[dropped], regions.last[index])
    free = ~inside & ~goes[table.value_number]
    for leaving in moved.leaving:
        ends[leaving.storage] = max(ends[leaving.storage], leaving.released)
    np.maximum.at(ends, table.value_storage[free], table.released[free])
    held = own & kept[table.value_storage]
    taken = np.where(table.asked, table.released, regions.done[held_in])
    np.maximum.at(ends, table.value_storage[held], taken[held])
    foreign = inside & ~own & ~goes[table.value_number]
    casting = [index for index in chosen if table.candidates[index].casts]
    for index in casting:
        anew = np.isin(table.value_storage, table.regions.casts[index][0])
        foreign &= ~(anew & (held_in == index))
    np.maximum.at(ends, table.value_storage[foreign], regions.done[held_in[foreign]])
    for index in chosen:
        arguments = _held_arguments(table, plan, index)
        ends[arguments] = np.maximum(ends[arguments], regions.done[index])
    end_places = before_death[ends]

    # Second lives: what a region makes again.
    length = int(before_op[count])
    again = (born_in >= 0) & ~kept
    begin2, end2, bytes2 = _second_lives(table, again, born_in, begun)
    lasting = np.nonzero(table.of_graph[bytes2])[0]
    done = before_death[regions.done[born_in[bytes2[lasting]]]]
    end2[lasting] = np.maximum(end2[lasting], done)
    order = np.full(len(table.nbytes), -1, dtype=np.int64)
    order[bytes2] = np.arange(len(bytes2))
    unkept = own & ~kept[table.value_storage]
    where = order[table.value_storage[unkept]]
    there = where >= 0
    np.maximum.at(end2, where[there], before_death[taken[unkept][there]])
    # What is kept is held for the recomputation that takes it, if not longer; what that does not
    # reach is held with the region.
    place = np.minimum(table.dies[keeps.storage] - keeps.first, keeps.needed)
    late = before_death[regions.done[keeps.region]]
    at = np.where(keeps.reached, begun[keeps.region] + place, late)
    np.maximum.at(end_places, keeps.storage, at)

    for index in casting:
        cast, begins, ends = _casts_anew(table, index, before_death, begun)
        bytes2 = np.concatenate([bytes2, cast])
        begin2, end2 = np.concatenate([begin2, begins]), np.concatenate([end2, ends])
    with_state = numbers[regions.extra_bytes[numbers] > 0]
    first, extra = regions.first[with_state], regions.extra_bytes[with_state]
    held_until = before_death[regions.done[with_state]]
    start = begun[with_state]
    # While it runs again, the program's own state waits beside it.
    states = StateLives(
        op=np.tile(first, 2),
        nbytes=np.tile(extra, 2),
        begin=np.concatenate([before_op[first], start]),
        end=np.concatenate([held_until, start + regions.needed[with_state]]),
    )
    return EagerLives(
        begins=before_op[table.born],
        ends=end_places,
        again=bytes2,
        again_begins=begin2,
        again_ends=end2,
        states=states,
        moved=moved,
        shares=shares_of(table.candidates, table.values, plan, (before_op, before_death, begun)),
        ran=_ran(table, numbers, before_op, begun, length),
        forward_length=int(before_death[forward_length]),
    )


@dataclass(frozen=True)
class _Keepings:
    """What kept ops make, one entry a storage: its region, and whether that runs the op again."""

    storage: Ints
    region: Ints
    first: Ints
    needed: Ints
    reached: npt.NDArray[np.bool_]


def _keepings(table: Table, plan: EagerPlan, op_region: Ints) -> _Keepings:
    is_kept = np.zeros(len(op_region), dtype=bool)
    is_kept[list(plan.kept)] = True
    found = np.nonzero(is_kept[table.maker])[0]
    makers = table.maker[found]
    region = op_region[makers]
    first, needed = table.regions.first[region], table.regions.needed[region]
    return _Keepings(table.makes[found], region, first, needed, makers - first < needed)


def _held_arguments(table: Table, plan: EagerPlan, index: int) -> Ints:
    """What a region holds for its recomputation."""
    held = table.regions.arguments[index]
    region = table.candidates[index]
    if index in plan.sends:
        held = np.setdiff1d(held, region.sent)
    if index in plan.shards:
        held = np.setdiff1d(held, [storage for storage, _, _ in region.parts])
    return held


def _goes(table: Table, plan: EagerPlan) -> npt.NDArray[np.bool_]:
    """Which of the saved values nobody holds meanwhile, since they move."""
    goes = np.zeros(len(table.values) + 1, dtype=bool)
    for index in plan.moved:
        goes[list(table.candidates[index].moves)] = True
    for index in plan.sends:
        region = table.candidates[index]
        goes[[n for n in range(*region.values) if table.values[n].storage in region.sent]] = True
    for index in plan.shards:
        region, parts = table.candidates[index], {s for s, _, _ in table.candidates[index].parts}
        goes[[n for n in range(*region.values) if table.values[n].storage in parts]] = True
    return goes


def _places(regions: Regions, chosen: Ints, count: int) -> tuple[Ints, Ints, Ints]:
    """Where each op stands once reruns are put in, where a death at each moment falls, and where
    each region's rerun begins.

    A death at a moment comes before the reruns that begin there.

    Args:
        regions: all candidates.
        chosen: those that run again, in the order in which they do.
        count: of the ops.
    """
    needed, reruns = regions.needed[chosen], regions.reruns[chosen]
    inserted = np.zeros(count + 2, dtype=np.int64)
    np.add.at(inserted, reruns, needed)
    starts = np.zeros(max(len(regions.first), 1), dtype=np.int64)
    starts[chosen] = reruns + np.cumsum(needed) - needed
    moments = np.arange(count + 1)
    up_to = np.cumsum(inserted[: count + 1])
    before = up_to - inserted[: count + 1]
    places = moments + up_to
    deaths = moments + before
    places[count] = deaths[count] = count + int(needed.sum())
    return places, deaths, starts


def _second_lives(
    table: Table, again: npt.NDArray[np.bool_], born_in: Ints, starts: Ints
) -> tuple[Ints, Ints, Ints]:
    """Begin, end (as far as Python goes) and storage of what is made a second time."""
    which = np.nonzero(again)[0]
    region = born_in[which]
    offset = table.born[which] - table.regions.first[region]
    runs = offset < table.regions.needed[region]
    which, region, offset = which[runs], region[runs], offset[runs]
    first, needed = table.regions.first[region], table.regions.needed[region]
    ends = np.minimum(table.dies[which] - first, needed)
    return starts[region] + offset, starts[region] + ends, which


def _casts_anew(
    table: Table, index: int, before_death: Ints, starts: Ints
) -> tuple[Ints, Ints, Ints]:
    """What a region casts anew, and begins and ends: a cache's, and of what autograd saves."""
    storages, offsets = table.regions.casts[index]
    begins = starts[index] + offsets
    ends = np.full(len(storages), starts[index] + table.regions.needed[index])
    region = table.candidates[index]
    for value in table.values[slice(*region.values)]:
        until = value.released if value.asked else region.done
        here = storages == value.storage
        ends[here] = np.maximum(ends[here], before_death[until])
    return storages, begins, ends


def _ran(table: Table, chosen: Ints, before_op: Ints, starts: Ints, length: int) -> Ints:
    """Which op runs at each place."""
    ran = np.zeros(length, dtype=np.int64)
    ran[before_op[:-1]] = np.arange(len(before_op) - 1)
    needed = table.regions.needed[chosen]
    inside = np.arange(int(needed.sum())) - np.repeat(np.cumsum(needed) - needed, needed)
    first, start = table.regions.first[chosen], starts[chosen]
    ran[np.repeat(start, needed) + inside] = np.repeat(first, needed) + inside
    return ran
