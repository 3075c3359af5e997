"""The exact solver with a link: every plan, with every set of moves, for very small steps.

The space is that of :mod:`ckpt_pass.planner.exact`, and for each of its plans every set of storages
that may move. Copies come back in the order of their first uses; then no other places of releases
and fetches make a shorter step than those of :mod:`ckpt_pass.planner.placing`: at each place the
wait ends as early as it can, and waiting later, or for less, makes nothing later. What is
enumerated grows exponentially, so that steps of more than a few values are refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ckpt_pass.planner.contract import UnsupportedProblemError
from ckpt_pass.planner.exact import broken_rule
from ckpt_pass.planner.ground import Ground
from ckpt_pass.planner.link import Link
from ckpt_pass.planner.offload_improve import Joint
from ckpt_pass.planner.problem import Problem, needed_by
from ckpt_pass.planner.schedule import Drop, anchor_order
from ckpt_pass.planner.solution import InfeasibleBudgetError, Solution, evaluate

# Plans without moves, and storages that one of them may move.
_PLANS = 4_000
_MOVABLE = 12


def exact_with_link(problem: Problem, budget_bytes: int, link: Link) -> Solution:
    """The plan of least step time within a budget.

    Args:
        problem: the step.
        budget_bytes: the most bytes on the device above what was allocated when the step began.
        link: what moves values.

    Raises:
        InfeasibleBudgetError: no plan fits.
        UnsupportedProblemError: there are too many plans.
    """
    best: Joint | None = None
    least_bytes: int | None = None
    for saved, drops in list(_plans(problem)):  # refused before any is simulated
        plan = evaluate(problem, saved, "exact", drops)
        if broken_rule(problem, plan):
            continue
        ground = Ground(problem, plan, link)
        least_bytes = min(least_bytes or ground.least_bytes, ground.least_bytes)
        if best is not None and ground.compute_s > best.time_s:
            continue
        if len(ground.rows) > _MOVABLE:
            raise _too_many(f"a plan with {len(ground.rows)} values that may be moved")
        for flags in itertools.product((False, True), repeat=len(ground.rows)):
            mask = np.array(flags, dtype=bool)
            if not mask[ground.must].all():
                continue
            found = Joint(ground, mask, ground.step_time_s(mask, budget_bytes), "exact")
            if found.time_s < float("inf") and (best is None or found.rank < best.rank):
                best = found
    if best is None:
        raise InfeasibleBudgetError(budget_bytes, least_bytes or 0)
    plan = best.solution(budget_bytes)
    return replace(plan, status="optimal", lower_bound_s=0.0)


def _plans(problem: Problem) -> Iterator[tuple[frozenset[int], frozenset[Drop]]]:
    """Saved sets and drops, all that differ in what runs when."""
    ops = problem.ops
    anchors = (*anchor_order(problem), *problem.backward_outputs)
    needed = sorted(needed_by(ops, anchors, frozenset()))
    fixed = problem.bound & set(needed)
    free = [i for i in needed if ops[i].savable and not ops[i].must_recompute and i not in fixed]
    below = [frozenset(needed_by(ops, anchors[k:], frozenset())) for k in range(len(anchors) + 1)]
    count = 0
    for size in range(len(free) + 1):
        for chosen in itertools.combinations(free, size):
            saved = fixed.union(chosen)
            for drops in _Backward(problem, anchors, saved, below).drops(0, saved):
                count += 1
                if count > _PLANS:
                    raise _too_many(f"more than {_PLANS:,} plans")
                yield saved, drops


@dataclass(frozen=True)
class _Backward:
    """All ways through the backward for one saved set."""

    problem: Problem
    anchors: tuple[int, ...]
    saved: frozenset[int]
    below: list[frozenset[int]]

    def drops(self, place: int, present: frozenset[int]) -> Iterator[frozenset[Drop]]:
        """What may be dropped from an anchor on."""
        while place < len(self.anchors) and self.anchors[place] in present:
            place += 1
        if place == len(self.anchors):
            yield frozenset()
            return
        problem, anchor = self.problem, self.anchors[place]
        missing = needed_by(problem.ops, (anchor,), present)
        present = present | missing
        touched = {
            problem.makers[s]
            for i in missing
            for s in problem.ops[i].touches
            if s in problem.makers
        }
        again = [
            i
            for i in sorted(touched & self.below[place + 1])
            if problem.may_repeat(i) and (present - self.saved) & self._held_by(i)
        ]
        for size in range(len(again) + 1):
            for chosen in itertools.combinations(again, size):
                gone = frozenset[int]().union(*(self._held_by(i) for i in chosen)) - self.saved
                here = frozenset((anchor, index) for index in chosen)
                for rest in self.drops(place + 1, present - gone):
                    yield here | rest

    def _held_by(self, index: int) -> frozenset[int]:
        holders = self.problem.holders
        return frozenset[int]().union(*(holders[s] for s in self.problem.ops[index].makes))


def _too_many(what: str) -> UnsupportedProblemError:
    return UnsupportedProblemError(
        f"The exact solver tries every plan where there is a link, and the step has {what}. Use "
        "solver='auto' or solver='layers' for this step."
    )
