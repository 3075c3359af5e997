"""Local search of joint plans: between saving, moving and computing again.

A joint plan is a plan without moves and a set of its storages that makes it fit. Each step changes
what is saved, chooses the set anew from the old one, and asks the clock. What is recomputed is
saved instead (and moved, where that hides), the most time for each byte first; what is moved is
recomputed instead, where its copies take the most time for that of its ops; drops are kept instead.
Changes are tried many at once first, then fewer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from ckpt_pass.planner.covering import Cover, by_idle_time
from ckpt_pass.planner.ground import Ground, Mask
from ckpt_pass.planner.improve import Change, ways_to_spare
from ckpt_pass.planner.schedule import Drop
from ckpt_pass.planner.solution import Solution, evaluate, step_time

# Storages of which it is tried whether they better move, or better stay.
_OTHERS = 60
# Values that are saved in exchange for as many others, each for each.
_EXCHANGED = 6

# Sums of seconds are equal within this, relatively.
ROUNDING = 1e-9

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
    """A local search, which can be taken up again.

    Args:
        start: where to begin.
        budget_bytes: the peak to stay within.

    Attributes:
        best: the best plan so far.
    """

    def __init__(self, start: Joint, budget_bytes: int) -> None:
        self.best, self._budget_bytes = start, budget_bytes
        self._label = f"{start.solver}, improved"
        self._left = 0
        self._seen: set[_Plan] = {(start.ground.plan.saved, start.ground.plan.drops)}

    def run(self, evaluations: int) -> None:
        """Search on.

        Args:
            evaluations: how many plans may be simulated.
        """
        self._left = evaluations
        if self.best.time_s <= step_time(self.best.ground.problem) * (1 + ROUNDING):
            return  # nothing is left to gain
        self._move_others()
        while self._left > 0:
            before = self.best
            self._round(ways_to_spare(before.ground.problem, before.ground.plan))
            self._round(_to_lose(self.best))
            if self.best is before:
                self._exchange()
            if self.best is before:
                break
            self._move_others()

    def _take(self, found: Joint) -> None:
        if found.rank < self.best.rank:
            self.best = replace(found, solver=self._label)

    # -- which storages move, the plan as it is

    def _move_others(self) -> None:
        """Move one storage less, or one more and perhaps others less, while that is better."""
        ground = self.best.ground
        if self.best.time_s <= ground.compute_s * (1 + ROUNDING):
            return  # nothing waits
        cover = Cover(ground, self._budget_bytes)
        order = by_idle_time(ground, self._budget_bytes)
        for row in order[: _OTHERS // 2] + order[-_OTHERS // 2 :]:
            if ground.must[row]:
                continue
            mask = self.best.mask.copy()
            mask[row] = not mask[row]
            rest = [other for other in order if other != row]
            found = cover.chosen(rest, mask, kept=row if mask[row] else None)
            if found is None:
                continue
            joint = Joint(
                ground,
                found,
                ground.step_time_s(found, self._budget_bytes),
                self.best.solver,
            )
            self._take(joint)

    # -- what is saved

    def _round(self, listed: Iterable[Change]) -> None:
        """Try changes of one kind, many at once first."""
        changes = list(listed)
        size = (len(changes) + 1) // 2
        while size and self._left > 0:
            for begin in range(0, len(changes), size):
                if self._left <= 0:
                    return
                self._try(changes[begin : begin + size])
            size //= 2

    def _exchange(self) -> None:
        """Save one thing more and another one less."""
        plan = self.best.ground.plan
        more = list(ways_to_spare(self.best.ground.problem, plan))[:_EXCHANGED]
        less = _to_lose(self.best)[:_EXCHANGED]
        for one in more:
            for other in less:
                if self._left <= 0:
                    return
                if not one.save & other.lose:
                    self._try((one, other))

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
        if found is not None:
            self._take(found)


def _to_lose(joint: Joint) -> list[Change]:
    """What is saved and may be recomputed, the least time for each byte first."""
    problem, plan = joint.ground.problem, joint.ground.plan
    priced = []
    for storage in {s for index in plan.saved for s in problem.ops[index].holds}:
        nbytes, maker = problem.storage_bytes[storage], problem.makers.get(storage)
        holders = problem.holders[storage] & plan.saved
        if not nbytes or maker is None or any(problem.ops[i].must_save for i in holders):
            continue
        change = Change(lose=frozenset(holders))
        priced.append((problem.ops[maker].time_s / nbytes, storage, change))
    return [change for _, _, change in sorted(priced, key=lambda entry: entry[:2])]


def fitted(ground: Ground, budget_bytes: int, like: Joint) -> Joint | None:
    """A plan made to fit with what another one moves, and more where that is too little."""
    if ground.compute_s > like.time_s:
        return None
    cover = Cover(ground, budget_bytes)
    mask = cover.chosen(by_idle_time(ground, budget_bytes), ground.mask_of(like.storages))
    if mask is None:
        return None
    return Joint(ground, mask, ground.step_time_s(mask, budget_bytes), like.solver)
