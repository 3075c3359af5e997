"""The chain of regions: what of a step belongs to which layer, and which layers are alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from ckpt_pass.planner.problem import Op, Problem
from ckpt_pass.planner.schedule import Drop, anchor_order


@dataclass(frozen=True)
class Segment:
    """One region: its ops, and the stretch of the backward that undoes it.

    Attributes:
        region: its number in the problem.
        members: its ops, in joint order, and for each its place among them.
        anchors: its stretch of the backward's anchors.
        earlier: anchors that ran before.
        there: storages that the backward has made and that are there when it begins.
        kept: storages that the backward has made and that are still there when it ends.
        kind: equal for regions that are alike op by op: they are solved once.
    """

    region: int
    members: tuple[int, ...]
    place_of: dict[int, int]
    anchors: tuple[int, ...]
    earlier: frozenset[int]
    there: frozenset[int]
    kept: frozenset[int]
    kind: int

    def like(self, other: Segment, index: int) -> int:
        """The op of this region that stands where ``index`` stands in a region that is alike."""
        place = other.place_of.get(index)
        return index if place is None else self.members[place]

    def translated(self, other: Segment, saved: Iterable[int]) -> frozenset[int]:
        """Ops of a region that is alike, as ops of this one."""
        return frozenset(self.like(other, index) for index in saved)

    def translated_drops(self, other: Segment, drops: Iterable[Drop]) -> frozenset[Drop]:
        """The same for drops."""
        return frozenset((self.like(other, a), self.like(other, i)) for a, i in drops)


def segments(problem: Problem) -> tuple[Segment, ...]:
    """The regions of a problem in the order of its forward."""
    return problem.derived("segments", _segments)


def _segments(problem: Problem) -> tuple[Segment, ...]:
    ops = problem.ops
    order = dict.fromkeys(op.region for op in ops if op.forward)
    members: dict[int, list[int]] = {region: [] for region in order}
    stretch = _stretches(problem, order)
    part_of = {anchor: region for region, anchors in stretch.items() for anchor in anchors}
    for index, op in enumerate(ops):
        region = part_of.get(index, op.region)
        members.setdefault(region, []).append(index)
    kinds: dict[object, int] = {}
    found, edges = [], _edges(problem, stretch)
    for region in order:
        inside = members[region]
        place_of = {index: place for place, index in enumerate(inside)}
        key = tuple(_signature(problem, ops[i], k, place_of) for k, i in enumerate(inside))
        earlier, there, kept = edges[region]
        found.append(
            Segment(
                region=region,
                members=tuple(inside),
                place_of=place_of,
                anchors=tuple(stretch[region]),
                earlier=earlier,
                there=there,
                kept=kept,
                kind=kinds.setdefault(key, len(kinds)),
            )
        )
    return tuple(found)


def _stretches(problem: Problem, order: Iterable[int]) -> dict[int, list[int]]:
    """For each region the anchors from its first one to the first one of a region not yet met."""
    found: dict[int, list[int]] = {region: [] for region in order}
    current: int | None = None
    for index in anchor_order(problem):
        region = problem.ops[index].region
        if current is None or (region in found and region != current and not found[region]):
            current = region if region in found else next(iter(found))
        found[current].append(index)
    return found


def _edges(
    problem: Problem, stretch: dict[int, list[int]]
) -> dict[int, tuple[frozenset[int], frozenset[int], frozenset[int]]]:
    """For each region: the anchors before it, and the storages at its beginning and end."""
    ops = problem.ops
    backward = {s for anchors in stretch.values() for i in anchors for s in ops[i].makes}
    last: dict[int, int] = {}
    place = 0
    run = sorted((a for a in stretch.items() if a[1]), key=lambda item: _first_place(problem, item))
    ends: dict[int, tuple[int, int]] = {}
    for region, anchors in run:
        begin = place
        for index in anchors:
            last.update((s, place) for s in ops[index].touches if s in backward)
            place += 1
        ends[region] = begin, place
    for storage in problem.output_storages:
        last[storage] = place
    found = {}
    alive: set[int] = set()
    before: frozenset[int] = frozenset()
    for region, anchors in run:
        stop = ends[region][1]
        there = frozenset(alive)
        alive |= {s for index in anchors for s in ops[index].makes}
        alive = {s for s in alive if last.get(s, -1) >= stop}
        found[region] = (before, there, frozenset(alive))
        before |= frozenset(anchors)
    nothing: frozenset[int] = frozenset()
    return {region: found.get(region, (nothing, nothing, nothing)) for region in stretch}


def _first_place(problem: Problem, item: tuple[int, list[int]]) -> int:
    places: dict[int, int] = problem.derived("anchor places", _anchor_places)
    return places[item[1][0]]


def _anchor_places(problem: Problem) -> dict[int, int]:
    return {index: place for place, index in enumerate(anchor_order(problem))}


def _signature(problem: Problem, op: Op, place: int, place_of: dict[int, int]) -> object:
    """What makes two ops alike: cost, sizes, constraints, and where inputs come from."""
    sources = tuple(place - place_of[i] if i in place_of else None for i in op.inputs)
    sizes = problem.storage_bytes
    return (
        sources,
        tuple(sizes[s] for s in op.makes),
        tuple(sizes[s] for s in op.touches),
        (op.forward, op.late, op.savable, op.must_save, op.must_recompute, op.ordered, op.once),
        (op.time_s, op.flops, op.workspace_bytes, op.random_state_bytes),
        tuple(s in op.overwrites for s in op.touches),
    )


def by_kind(chain: Iterable[Segment]) -> dict[int, list[Segment]]:
    """Regions that are alike, together."""
    found: dict[int, list[Segment]] = defaultdict(list)
    for segment in chain:
        found[segment.kind].append(segment)
    return dict(found)
