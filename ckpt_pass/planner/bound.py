"""A lower bound on the recompute time of every plan within a budget.

Each moment of the backward gets a price, in seconds a byte. A saved value pays the prices of the
moments through which it is held at the least: from the end of the forward to its last direct use;
a recomputed one pays its time, and between two direct uses either the prices or its time again.
What anchors read, make and bring along at a moment is there in any case. With these *optimistic*
lives the least sum is one minimum cut, and that sum less budget x prices is a lower bound for any
prices (Lagrangian duality). Subgradient steps make it as large as they can: prices rise where the
cut's own plan is over the budget.

Optimistic is: a recomputed value counts nothing but at its direct uses, working sets of the
recomputation are left out, and so is whatever the forward alone needs.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckpt_pass.planner.cut import CutGraph
from ckpt_pass.planner.liveness import lives
from ckpt_pass.planner.problem import Problem, needed_by
from ckpt_pass.planner.schedule import anchor_order
from ckpt_pass.planner.solution import Solution

# Moments with a price, spread over the backward at the local peaks of the plan; more changed the
# bound of the reference models by less than 0.1 % of the step.
_MOMENTS = 48
# Subgradient steps of a run; the bound of the reference models is flat after them.
_STEPS = 60
# Polyak's steps overshoot now and then, and a run then stalls: two runs, the better one counts.
_SCALES = (1.0, 0.4)
# Polyak's step is halved after this many steps without gain.
_PATIENCE = 6

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Bound:
    """A lower bound, and the plans that it met on its way.

    Attributes:
        time_s: seconds that every plan within the budget recomputes at the least.
        saved: what the cuts saved, those at the best prices last. They know the prices of
            moments, as uniform cuts do not, but not the working sets.
    """

    time_s: float
    saved: tuple[frozenset[int], ...] = ()


def lower_bound(problem: Problem, budget_bytes: int, plan: Solution) -> Bound:
    """Bound the recompute time of all plans within a budget from below.

    Args:
        problem: the step.
        budget_bytes: the peak to stay within.
        plan: a plan within it; the bound is sought below its time, at the moments of its peaks.
    """
    if plan.recompute_time_s <= 0:
        return Bound(0.0)
    held = held_at(problem, plan)
    met: dict[frozenset[int], None] = {}
    best = max(_ascended(held, budget_bytes, plan.recompute_time_s, s, met) for s in _SCALES)
    return Bound(min(best, plan.recompute_time_s), tuple(met))


def _ascended(
    held: Held, budget_bytes: int, above_s: float, scale: float, met: dict[frozenset[int], None]
) -> float:
    """The best bound of one run of Polyak's subgradient steps towards ``above_s``.

    Args:
        held: the optimistic lives.
        budget_bytes: the peak to stay within.
        above_s: no bound is higher.
        scale: of the first steps.
        met: what the cuts saved goes here, the newest last.
    """
    best, prices = 0.0, np.zeros(len(held.fixed))
    at_best, stale = prices, 0
    for _ in range(_STEPS):
        value, excess, saved = held.dual(prices, budget_bytes)
        met.pop(saved, None)
        met[saved] = None
        if value > best * (1 + 1e-6):
            best, at_best, stale = value, prices, 0
        else:
            stale += 1
        if stale >= _PATIENCE:  # from the best prices on, in smaller steps
            scale, stale, prices = scale / 2, 0, at_best
            value, excess, _ = held.dual(prices, budget_bytes)
        slack = np.where((prices <= 0) & (excess < 0), 0.0, excess)
        size = float(slack @ slack)
        if not size:
            break
        prices = np.maximum(0.0, prices + scale * (above_s - value) / size * slack)
    return best


@dataclass(frozen=True)
class Held:
    """The optimistic lives of the values that may be saved.

    Attributes:
        graph: the network.
        nbytes: of each member.
        fixed: bytes at each moment that are there in any case.
        through: members x moments: whether a saved one is held through the moment.
        gaps: (member, moments between two direct uses of it).
    """

    graph: CutGraph
    nbytes: Floats
    fixed: Floats
    through: NDArray[np.bool_]
    gaps: tuple[tuple[int, NDArray[np.int64]], ...]

    def dual(self, prices: Floats, budget_bytes: int) -> tuple[float, Floats, frozenset[int]]:
        """The bound at some prices, by how much the cut exceeds the budget when, what it saves."""
        save = (self.through @ prices) * self.nbytes
        run = self.graph.times.copy()
        again = np.zeros_like(self.fixed)
        kept: list[tuple[int, NDArray[np.int64]]] = []
        for member, moments in self.gaps:
            keeping = float(prices[moments].sum()) * self.nbytes[member]
            if keeping < self.graph.times[member]:
                kept.append((member, moments))
            run[member] += min(keeping, self.graph.times[member])
        cut = self.graph.minimise(save, run)
        for member, moments in kept:
            if cut.recomputed[member]:
                again[moments] += self.nbytes[member]
        used = self.fixed + again + (self.through * self.nbytes[:, None])[cut.saved].sum(axis=0)
        value = cut.bound + float(prices @ (self.fixed - budget_bytes))
        saved = frozenset(self.graph.members[i] for i in np.flatnonzero(cut.saved))
        return value, used - budget_bytes, saved


def held_at(problem: Problem, plan: Solution) -> Held:
    """The optimistic lives at the moments of a plan's peaks."""
    return _held(problem, CutGraph.of(problem), _moments(problem, plan))


def _moments(problem: Problem, plan: Solution) -> list[int]:
    """Places among the anchors: where the plan's bytes are highest, spread over the backward."""
    anchors = anchor_order(problem)
    place_of = {index: place for place, index in enumerate(anchors)}
    bytes_at = plan.profile.bytes_at[plan.profile.forward_length :]
    at = np.zeros(len(anchors), dtype=np.int64)
    pending = 0
    for index, nbytes in zip(plan.steps.backward, bytes_at, strict=True):
        pending = max(pending, nbytes)
        if index in place_of:
            at[place_of[index]], pending = pending, 0
    parts = np.array_split(np.arange(len(anchors)), min(_MOMENTS, len(anchors)))
    return sorted({0, *(int(part[at[part].argmax()]) for part in parts if len(part))})


def _held(problem: Problem, graph: CutGraph, moments: Sequence[int]) -> Held:
    anchors, at = anchor_order(problem), np.array(moments)
    direct, first = _direct_uses(problem, anchors)
    through = np.zeros((len(graph.members), len(at)), dtype=bool)
    gaps: list[tuple[int, NDArray[np.int64]]] = []
    fixed, taken = (_fixed(problem, anchors, overwrite=o)[at] for o in (False, True))
    taken = fixed - taken
    fixed = fixed.astype(np.float64)
    free, sizes = set(problem.forward_outputs), problem.storage_bytes
    read = {s for index in graph.members for s in problem.ops[index].makes}
    for place, moment in enumerate(moments):
        op = problem.ops[anchors[moment]]
        touched = set(op.touches) & read - free
        fixed[place] += sum(sizes[s] for s in touched)
        # Where it may write over what was made again, it is taken to do so.
        fixed[place] -= max(taken[place], *(sizes[s] for s in op.overwrites if s in touched), 0)
    for member, index in enumerate(graph.members):
        if not graph.savable[member]:
            continue
        uses = sorted({u for s in problem.ops[index].holds for u in direct.get(s, ())})
        last = max([*uses, first.get(index, 0)])
        through[member] = (at < last) & ~np.isin(at, uses)
        for before, after in itertools.pairwise(uses):
            between = np.flatnonzero((at > before) & (at < after))
            if len(between):
                gaps.append((member, between))
    return Held(graph, graph.save_bytes, fixed, through, tuple(gaps))


def _fixed(problem: Problem, anchors: Sequence[int], *, overwrite: bool) -> NDArray[np.int64]:
    """Bytes of the backward's own values while each anchor runs."""
    ops = problem.ops
    own = {s for index in anchors for s in ops[index].makes}
    kept = own & set(problem.output_storages)
    return lives(problem, anchors, (), kept, overwrite=overwrite).bytes_at


def _direct_uses(
    problem: Problem, anchors: Sequence[int]
) -> tuple[dict[int, list[int]], dict[int, int]]:
    """Places of the anchors that read each storage, and the first one that needs each op."""
    ops = problem.ops
    direct: dict[int, list[int]] = defaultdict(list)
    first: dict[int, int] = {}
    for place, anchor in enumerate(anchors):
        for storage in ops[anchor].touches:
            direct[storage].append(place)
        new = needed_by(ops, ops[anchor].inputs, first.keys())
        first.update((index, place) for index in new)
    return direct, first
