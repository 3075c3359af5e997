"""Local search of joint plans: between saving, moving and computing again.

A joint plan is a plan without moves and a set of its storages that makes it fit. Each step changes
what is saved, chooses the set anew from the old one, and asks the clock. What is recomputed is
saved instead (and moved, where that hides), the most time for each byte first; what is moved is
recomputed instead, where its copies take the most time for that of its ops; drops are kept instead.
Changes are tried many at once first, then fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from ckpt_pass.planner.covering import Cover, by_idle_time
from ckpt_pass.planner.ground import Ground, Mask
from ckpt_pass.planner.improve import Change, ways_to_spare
from ckpt_pass.planner.schedule import Drop
from ckpt_pass.planner.solution import Solution, evaluate

_Plan: TypeAlias = tuple[frozenset[int], frozenset[Drop]]


@dataclass(frozen=True, eq=False)
class Joint:
    """A plan, what of it is moved, and how long the step takes by the clock.

    Attributes:
        ground: the plan.
        mask: of its rows those that are moved.
        time_s: of the step.
        solver: where it comes from, in words.
    """

    ground: Ground
    mask: Mask
    time_s: float
    solver: str

    @property
    def rank(self) -> tuple[float, int, int, list[int]]:
        """Cheapest first; less recomputation, then fewer moved bytes where the time is equal."""
        rows, plan = self.ground.rows, self.ground.plan
        moved = int(rows.nbytes[self.mask].sum())
        return self.time_s, plan.recompute_flops, moved, sorted(plan.saved)

    @property
    def storages(self) -> frozenset[int]:
        """What is moved."""
        return frozenset(self.ground.rows.storage[self.mask].tolist())

    def solution(self, budget_bytes: int) -> Solution:
        """As a solution."""
        return self.ground.solution(self.mask, budget_bytes, self.solver)


class Search:
    """A local search with so many simulations to spend.

    Args:
        best: where to begin.
        budget_bytes: the peak to stay within.
        evaluations: how many plans may be simulated.
    """

    def __init__(self, best: Joint, budget_bytes: int, evaluations: int) -> None:
        self.best, self._budget_bytes = best, budget_bytes
        self._left = evaluations
        self._seen: set[_Plan] = {(best.ground.plan.saved, best.ground.plan.drops)}

    def run(self) -> Joint:
        """The best plan that was found; the first one where there is none better."""
        start = self.best
        self._mask_search()
        while self._left > 0 and (self._round(self._to_save) | self._round(self._to_lose)):
            self._mask_search()
        if self.best is start:
            return start
        label = f"{start.solver}, improved"
        return Joint(self.best.ground, self.best.mask, self.best.time_s, label)

    # -- which storages move, the plan as it is

    def _mask_search(self) -> None:
        """Move less: give back one storage after another where that costs no time."""
        best = self.best
        for row in np.flatnonzero(best.mask)[::-1].tolist():
            mask = best.mask.copy()
            mask[row] = False
            if not best.ground.covers(mask, self._budget_bytes):
                continue
            time_s = best.ground.step_time_s(mask, self._budget_bytes)
            if time_s <= best.time_s:
                best = Joint(best.ground, mask, time_s, best.solver)
        self.best = best

    # -- what is saved

    def _to_save(self) -> list[Change]:
        return list(ways_to_spare(self.best.ground.problem, self.best.ground.plan))

    def _to_lose(self) -> list[Change]:
        """What is moved, those first whose copies take the most for the time of their ops."""
        ground = self.best.ground
        problem, link = ground.problem, ground.link
        priced = []
        for storage in self.best.storages:
            holders = problem.holders[storage] & ground.plan.saved
            nbytes = problem.storage_bytes[storage]
            if any(problem.ops[i].must_save for i in holders):
                continue
            time_s = problem.ops[problem.makers[storage]].time_s
            copies_s = link.out_s(nbytes) + link.in_s(nbytes)
            priced.append((time_s / copies_s, storage, Change(lose=frozenset(holders))))
        return [change for _, _, change in sorted(priced, key=lambda entry: entry[:2])]

    def _round(self, listed: object) -> bool:
        """Try changes of one kind, many at once first; whether any was good."""
        assert callable(listed)
        start, changes = self.best, listed()
        size = (len(changes) + 1) // 2
        while size and self._left > 0:
            for begin in range(0, len(changes), size):
                if self._left <= 0:
                    break
                self._try(changes[begin : begin + size])
            size //= 2
        return self.best is not start

    def _try(self, changes: Sequence[Change]) -> None:
        best = self.best
        problem = best.ground.problem
        nothing: frozenset[int] = frozenset()
        save = nothing.union(*(c.save for c in changes))
        lose = nothing.union(*(c.lose for c in changes))
        saved = (best.ground.plan.saved | save | problem.bound) - lose
        drops = best.ground.plan.drops - frozenset(d for c in changes for d in c.keep)
        if (saved, drops) in self._seen:
            return
        self._seen.add((saved, drops))
        self._left -= 1
        plan = evaluate(problem, saved, best.ground.plan.solver, drops)
        found = fitted(Ground(problem, plan, best.ground.link), self._budget_bytes, best)
        if found is not None and found.rank < best.rank:
            self.best = found


def fitted(ground: Ground, budget_bytes: int, like: Joint) -> Joint | None:
    """A plan made to fit with what another one moves, and more where that is too little."""
    if ground.compute_s > like.time_s:
        return None
    cover = Cover(ground, budget_bytes)
    mask = cover.chosen(by_idle_time(ground, budget_bytes), ground.mask_of(like.storages))
    if mask is None:
        return None
    return Joint(ground, mask, ground.step_time_s(mask, budget_bytes), like.solver)
