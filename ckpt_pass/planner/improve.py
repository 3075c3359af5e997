"""Local search: spend what a plan leaves of its budget.

A plan from the pool seldom fills its budget. Each round looks at the recomputed values and at the
drops, the most recompute time for each byte first, and saves the value, or keeps it, where the
simulator says that the step still fits and is faster. When no such move is left, what needs too
much is tried in exchange for a saved value that is cheap to make again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ckpt_pass.planner.problem import Problem
from ckpt_pass.planner.schedule import Drop
from ckpt_pass.planner.solution import Solution, cheapest_first, evaluate

# Values tried in exchange for one; the first few are those that cost little to make again.
_SWAPS = 3


def improved(problem: Problem, plan: Solution, budget_bytes: int, evaluations: int) -> Solution:
    """A plan within the budget that is no slower than ``plan``.

    Args:
        problem: the step.
        plan: a plan within the budget.
        budget_bytes: the peak to stay within.
        evaluations: how many plans may be simulated.
    """
    search = _Search(problem, budget_bytes, plan, evaluations)
    while search.round(swaps=False) or search.round(swaps=True):
        pass
    best = search.best
    return best if best is plan else replace(best, solver=f"{plan.solver}, improved")


@dataclass(frozen=True)
class Change:
    """What to save, or to keep, instead of computing it again; or not to save any more."""

    save: frozenset[int] = frozenset()
    keep: frozenset[Drop] = frozenset()
    lose: frozenset[int] = frozenset()


class _Search:
    def __init__(
        self, problem: Problem, budget_bytes: int, plan: Solution, evaluations: int
    ) -> None:
        self._problem, self._budget_bytes = problem, budget_bytes
        self._left = evaluations
        self.best = plan

    def round(self, *, swaps: bool) -> bool:
        """Try every move once, the most promising first; whether any was good.

        Args:
            swaps: for a move that needs too much, give up something that is saved.
        """
        start = self.best
        for move in ways_to_spare(self._problem, start):
            # What was accepted before in this round stays.
            found = self._try(move, frozenset())
            if found is None:
                break
            over = found.peak_bytes - self._budget_bytes
            if over > 0 and swaps and found.recompute_time_s < self.best.recompute_time_s:
                for index in _cheapest_to_lose(self._problem, self.best, move.save, over):
                    self._try(move, frozenset({index}))
        return self.best is not start

    def _try(self, move: Change, lose: frozenset[int]) -> Solution | None:
        """Simulate, and take what is better; ``None`` when no simulation is left."""
        if self._left <= 0:
            return None
        self._left -= 1
        best = self.best
        saved = (best.saved | move.save | self._problem.bound) - lose
        found = evaluate(self._problem, saved, best.solver, best.drops - move.keep)
        fits = found.peak_bytes <= self._budget_bytes
        if fits and cheapest_first(found) < cheapest_first(best):
            self.best = found
        return found


def ways_to_spare(problem: Problem, plan: Solution) -> Iterator[Change]:
    """What to save or to keep, the most recompute time for each byte first."""
    runs = Counter(plan.steps.backward)
    priced: list[tuple[float, int, Change]] = []
    for index, times in runs.items():
        op = problem.ops[index]
        save = _savable(problem, runs, index) if op.forward else frozenset()
        time_s = _time_to_make(problem, runs, index) * times
        if save and time_s > 0:
            nbytes = sum(problem.storage_bytes[s] for i in save for s in problem.ops[i].holds)
            priced.append((-time_s / max(nbytes, 1), index, Change(save=save)))
    for drop in sorted(plan.drops):
        op = problem.ops[drop[1]]
        if runs[drop[1]] > 1 and op.time_s > 0:
            nbytes = sum(problem.storage_bytes[s] for s in op.makes)
            price = -op.time_s / max(nbytes, 1)
            priced.append((price, drop[1], Change(keep=frozenset({drop}))))
    for _, _, move in sorted(priced, key=lambda entry: entry[:2]):
        yield move


def _savable(problem: Problem, runs: Counter[int], index: int) -> frozenset[int]:
    """What to save so that an op need not run: its result, or all of its outputs that are read."""

    def may(i: int) -> bool:
        return problem.ops[i].savable and not problem.ops[i].must_recompute

    if may(index):
        return frozenset({index})
    outputs = [user for user in problem.users[index] if user in runs]
    several = len(problem.ops[index].makes) > 1 and all(may(user) for user in outputs)
    return frozenset(outputs) if several else frozenset()


def _cheapest_to_lose(
    problem: Problem, plan: Solution, besides: frozenset[int], over_bytes: int
) -> list[int]:
    """Saved values whose bytes make up for what a move has too much, the least time first."""

    def nbytes(index: int) -> int:
        return sum(problem.storage_bytes[s] for s in problem.ops[index].holds)

    open_ = [i for i in plan.saved - besides if not problem.ops[i].must_save]
    enough = [i for i in open_ if nbytes(i) >= over_bytes]
    return sorted(enough, key=lambda i: (problem.ops[i].time_s, i))[:_SWAPS]


def _time_to_make(problem: Problem, runs: Counter[int], index: int) -> float:
    """Seconds of a recomputed op, and of those that run for it alone."""
    total, stack, seen = 0.0, [index], {index}
    while stack:
        current = stack.pop()
        total += problem.ops[current].time_s
        for source in problem.ops[current].inputs:
            alone = all(user in seen or user not in runs for user in problem.users[source])
            if alone and source in runs and source not in seen:
                seen.add(source)
                stack.append(source)
    return total
