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

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ckpt_pass.planner.alive import Life
from ckpt_pass.planner.clock import Transfer
from ckpt_pass.planner.eager_following import follow
from ckpt_pass.planner.eager_lives import EagerLives
from ckpt_pass.planner.eager_moves import (
    Copying,
    Journeys,
    copying,
    transfers,
)
from ckpt_pass.planner.eager_parts import (
    EagerOp,
    EagerPlan,
    EagerRegion,
    EagerStorage,
    Microbatches,
    Ranks,
    SavedValue,
)
from ckpt_pass.planner.eager_shares import gathers
from ckpt_pass.planner.eager_table import Ints, Table, ints
from ckpt_pass.planner.link import Link


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
        gather_s, gathered_bytes: of what ranks gather from each other.
    """

    bytes_at: Ints
    ops: Ints
    backward_begins: int
    recompute_time_s: float
    recompute_flops: int
    away_bytes: int = 0
    moved: Journeys | None = None
    copies: Copying | None = None
    gather_s: float = 0.0
    gathered_bytes: int = 0

    @property
    def stall_s(self) -> float:
        """What ops wait for copies."""
        return self.copies.stall_s if self.copies is not None else 0.0

    @property
    def overhead_s(self) -> float:
        """What the step takes more than the plain one."""
        return self.recompute_time_s + self.stall_s + self.gather_s

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
        ranks: those that may share out what regions are given; ``None`` where there are none.
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
    ranks: Ranks | None = None

    @cached_property
    def _table(self) -> Table:
        return Table(self.ops, self.storages, self.values, self.regions)

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
        return self.followed(plan).alive(self.ops, self.storages)

    def followed(self, plan: EagerPlan) -> EagerLives:
        """Where each storage is in memory."""
        return follow(self._table, plan, self.forward_length, self.in_flight)

    @property
    def step_time_s(self) -> float:
        """Modelled time of the step with nothing recomputed."""
        return sum(op.time_s for op in self.ops)


def _simulate(problem: EagerProblem, table: Table, plan: EagerPlan) -> EagerProfile:
    found = problem.followed(plan)
    bytes_at = found.bytes_at(table.nbytes, table.workspace)
    moved, ran, begins = found.moved, found.ran, found.forward_length
    if problem.microbatches is not None:
        waits = (found.begins < begins) & (found.ends > begins) & ~table.shared
        states = sum(problem.regions[index].extra_bytes for index in plan.regions)
        parts = sum(share.nbytes for share in found.shares if share.is_part)
        each = int(table.nbytes[waits].sum()) + states + parts
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
        *_recomputed(problem, table, plan),
        sum(-(-int(table.nbytes[one.storage]) // unit) * unit for one in moved.leaving),
        moved if copies is not None else None,
        copies,
        *gathers(problem.regions, problem.ranks, plan),
    )


def _recomputed(problem: EagerProblem, table: Table, plan: EagerPlan) -> tuple[float, int]:
    """Seconds of what runs again, and of looking for what is kept; and its flops."""
    regions = table.regions
    seconds = [regions.seconds[index] for index in plan.regions]
    flops = sum(regions.flops[index] for index in plan.regions)
    looked_at = 0
    if plan.kept:
        # Regions that run again do not overlap: that of an op is the last one that begins before.
        numbers = ints(sorted(plan.regions, key=lambda index: problem.regions[index].ops[0]))
        kept = ints(plan.kept)
        inside = numbers[np.searchsorted(regions.first[numbers], kept, side="right") - 1]
        spared = kept[kept - regions.first[inside] < regions.needed[inside]]
        seconds += (-table.seconds[spared]).tolist()
        flops -= int(table.flops[spared].sum())
        looked_at = int(regions.needed[np.unique(inside)].sum())
    # The exact sum: the order in which a plan names its regions is not in it.
    return math.fsum(seconds) + looked_at * problem.keeping_s, flops


def _left(table: Table, ends: Ints, length: int) -> Ints:
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
