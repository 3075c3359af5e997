"""What each region of a chain can do: what it saves, and how its backward runs then.

The saved sets come from uniform plans; the ways of the backward from
:mod:`ckpt_pass.planner.squeeze`. Regions that are alike share a menu.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from ckpt_pass.planner.problem import Problem, needed_by
from ckpt_pass.planner.schedule import Drop
from ckpt_pass.planner.segments import Segment, by_kind, segments
from ckpt_pass.planner.solution import Solution
from ckpt_pass.planner.squeeze import Undone, squeezed
from ckpt_pass.planner.tables import Tables

# Drops for one way to undo a region; the layers of the reference models have none left after 20.
_STEPS = 40


@dataclass(frozen=True)
class Entry:
    """One choice for a region.

    Attributes:
        saved: ops to save, of the region for which the entry was made.
        drops: what its backward does not keep.
        saved_bytes: what they hold.
        time_s: recompute time of the region.
        forward_bytes: the most bytes while its forward runs, and
        working_bytes: while it is undone; both less what this and earlier regions saved, and the
            latter less what the backward brings along.
    """

    saved: frozenset[int]
    drops: frozenset[Drop]
    saved_bytes: int
    time_s: float
    forward_bytes: int
    working_bytes: int


class Menus:
    """The regions of a problem with their menus.

    Args:
        problem: the step.
        plans: what they save in a region is in its menu.
        borders: ops whose results cross from one region to the next.

    Attributes:
        regions: in the order of the forward.
        brings: bytes of the backward's own that are there when each region is undone.
        models: for each kind of region the one that its entries are made for.
        entries: for each kind.
        lean: those entries that save nothing but borders.
        forward_time_s: for each kind, of making its borders from the borders before.
    """

    def __init__(
        self, problem: Problem, plans: Sequence[Solution], borders: Collection[int]
    ) -> None:
        self._problem = problem
        self._borders = frozenset(borders)
        self.regions = segments(problem)
        sizes = Tables.of(problem).sizes
        self.brings = [int(sizes[list(s.there)].sum()) for s in self.regions]
        self.models = {kind: alike[-1] for kind, alike in by_kind(self.regions).items()}
        self.entries = {
            kind: _undominated(self._menu(model, plans)) for kind, model in self.models.items()
        }
        self.lean = {
            kind: [e for e in menu if e.saved and e.saved <= self._borders]
            for kind, menu in self.entries.items()
        }
        self.forward_time_s = {kind: self._forward_time(m) for kind, m in self.models.items()}

    def _menu(self, model: Segment, plans: Sequence[Solution]) -> list[Entry]:
        seen: set[object] = set()
        found: list[Entry] = []
        position = [s.region for s in self.regions].index(model.region)
        read = self._read_by(model)
        for plan in plans:
            own = plan.saved.intersection(model.place_of)
            key = (own, (plan.saved - own) & read)
            if key in seen:
                continue
            seen.add(key)
            nbytes = self._bytes_of(own)
            forward = self._forward_bytes(position, plan)
            for way in squeezed(self._problem, model, plan.saved, _STEPS):
                working = way.peak_bytes - self.brings[position] - nbytes
                drops = way.drops | self._trailing(model, way)
                found.append(Entry(own, drops, nbytes, way.time_s, forward, working))
        return found

    def _read_by(self, model: Segment) -> set[int]:
        ops = self._problem.ops
        return {i for index in model.members for i in ops[index].inputs} - model.place_of.keys()

    def _bytes_of(self, saved: Iterable[int]) -> int:
        held = {s for index in saved for s in self._problem.ops[index].holds}
        free = set(self._problem.forward_outputs)
        return sum(self._problem.storage_bytes[s] for s in held - free)

    def _forward_bytes(self, position: int, plan: Solution) -> int:
        """The most bytes while a region's forward runs, less what it and earlier ones saved."""
        inside = self.regions[position].place_of
        ran = zip(plan.profile.bytes_at, plan.steps.forward, strict=False)
        most = max((nbytes for nbytes, index in ran if index in inside), default=0)
        before = {i for region in self.regions[: position + 1] for i in region.place_of}
        return most - self._bytes_of(plan.saved & before)

    def _trailing(self, model: Segment, way: Undone) -> frozenset[Drop]:
        """What a region computed of other regions is not kept for the next one."""
        if not model.anchors:
            return frozenset()
        problem, end = self._problem, model.anchors[-1]
        return frozenset(
            (end, index)
            for index in way.order
            if index not in model.place_of
            and problem.ops[index].makes
            and problem.may_repeat(index)
        )

    def _forward_time(self, model: Segment) -> float:
        own = self._borders.intersection(model.place_of)
        ops = self._problem.ops
        return sum(ops[i].time_s for i in needed_by(ops, own, self._borders - own))


def _undominated(menu: Collection[Entry]) -> list[Entry]:
    """Entries that no other beats in bytes, time and working set at once."""
    kept: list[Entry] = []
    order = sorted(menu, key=lambda e: (e.time_s, e.saved_bytes, e.working_bytes, e.forward_bytes))
    for entry in order:
        if not any(
            k.saved_bytes <= entry.saved_bytes
            and k.working_bytes <= entry.working_bytes
            and k.forward_bytes <= entry.forward_bytes
            for k in kept
        ):
            kept.append(entry)
    return kept
