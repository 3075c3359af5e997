"""Choose the checkpoint regions of an eager step, and what they keep.

The candidates nest like the modules do. For a price on held bytes and a limit on the memory that
one region's backward may need, the best choice is found exactly, from the inside out, as if bytes
added up; sweeping both gives uniform plans. Those on the convex hull of time and peak are mixed
layer by layer, and single ops are kept where there is room. Every plan on the way is simulated and
remembered; a budget takes the fastest that fits. What is remembered does not depend on the budget,
so that a larger budget never gives a slower plan.

With a link a candidate may move instead of running again. What its copies cost is not known before
the clock has run them beside the others, so that shares of it are tried.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

from ckpt_pass.planner.eager_parts import EagerPlan
from ckpt_pass.planner.eager_problem import EagerProblem, EagerProfile
from ckpt_pass.planner.eager_ties import Ties
from ckpt_pass.planner.eager_tree import AHEAD, Tree
from ckpt_pass.planner.solution import InfeasibleBudgetError

#: Plans of the frontier to which single ops are added.
_POLISHED = 24
#: What of the seconds of copies is taken to be waited for.
_WAITED_SHARES = (0.0, 0.02, 0.2, 1.0)
#: The peak of a plan for which the other place is too small.
_NOWHERE = 1 << 62


@dataclass(frozen=True)
class EagerSolution:
    """A plan with what it costs.

    Attributes:
        plan: the regions and what they keep.
        profile: the simulated step.
        tried: how many plans were simulated.
    """

    plan: EagerPlan
    profile: EagerProfile
    tried: int

    @property
    def status(self) -> str:
        """``optimal`` where nothing is recomputed or waited for; otherwise nothing is proven."""
        return "feasible" if self.plan.regions or self.profile.overhead_s else "optimal"


def solve_eager(problem: EagerProblem, budget_bytes: int) -> EagerSolution:
    """The fastest known plan whose peak is within ``budget_bytes``.

    Raises:
        InfeasibleBudgetError: none is; it names the least peak that was found.
    """
    pool = EagerPool(problem)
    fitting = [entry for entry in pool.frontier() if entry[1] <= budget_bytes]
    if not fitting:
        raise InfeasibleBudgetError(budget_bytes, pool.least_peak_bytes)
    plan = fitting[0][2]
    return EagerSolution(plan, problem.simulate(plan), len(pool.plans))


Entry = tuple[float, int, EagerPlan]
"""Recompute time and waiting in seconds, peak in bytes, and the plan."""


class EagerPool:
    """The plans that were simulated for a step."""

    def __init__(self, problem: EagerProblem) -> None:
        self._problem = problem
        self._tree = Tree(problem)
        self._ties = Ties(problem)
        self.plans: dict[EagerPlan, tuple[float, int]] = {}
        self._too_large: set[EagerPlan] = set()
        self._add(EagerPlan())
        for limit in self._tree.limits():
            for price in self._tree.prices():
                self._add(self._tree.best(price, limit))
        self._mix_hull()
        self._polish()
        self._mix_hull()
        self._mix(self.frontier())
        if problem.ranks is not None:  # afterwards: no plan is slower for it
            self._share_out()
        if problem.link is not None:  # afterwards: no plan is slower for it
            self._move()
            self._mix_hull()
            self._mix(self.frontier())
            self._vary_ahead()

    @property
    def least_peak_bytes(self) -> int:
        """The least peak of all plans."""
        return min(peak for _, peak in self.plans.values())

    def frontier(self) -> list[Entry]:
        """The plans that no other beats in time and peak, fastest first."""
        found: list[Entry] = []
        least: int | None = None
        for plan, (time_s, peak) in sorted(self.plans.items(), key=_order):
            if least is None or peak < least:
                found.append((time_s, peak, plan))
                least = peak
        return found

    def _add(self, plan: EagerPlan) -> tuple[float, int]:
        plan = self._ties.tied(plan)
        known = self.plans.get(plan)
        if known is None:
            profile = self._problem.simulate(plan)
            link = self._problem.link
            fits = link is None or link.may_hold(profile.away_bytes)
            peak = profile.peak_bytes if fits else _NOWHERE
            known = self.plans[plan] = profile.overhead_s, peak
        return known

    def _share_out(self) -> None:
        """Let ranks share out what regions are given, at all prices, and in the plans there are."""
        for _, _, plan in self.frontier():
            self._add(self._tree.sharing(plan))
        for limit in self._tree.limits():
            for price in self._tree.prices():
                self._add(self._tree.best(price, limit, shares=True))
        self._mix_hull()
        self._mix(self.frontier())
        for _, peak, plan in self.frontier():
            self._share_less(plan, peak)

    def _share_less(self, plan: EagerPlan, ceiling: int) -> None:
        """Keep whole what a peak of ``ceiling`` bytes has room for."""
        found: EagerPlan | None = plan
        while found is not None:
            less = self._tree.sharing_less(found)
            found = next((one for one in less if self._add(one)[1] <= ceiling), None)

    def _move(self) -> None:
        """Let candidates move at all prices; by the tightest and the loosest limit."""
        limits = self._tree.limits()
        for share in _WAITED_SHARES:
            for limit in dict.fromkeys((0, *limits[len(limits) // 2 :][:1], *limits[-1:])):
                for price in self._tree.prices():
                    plan = self._tree.best(price, limit, share)
                    self._add_within(plan)
                    if not share:  # the least peaks, however slow the link is
                        self._add_within(replace(plan, ahead=0))

    def _add_within(self, plan: EagerPlan) -> None:
        """Add a plan; where the other place is too small for it, two that move less.

        What is made last stays, or runs again: it would be away for the shortest time.
        """
        if self._add(plan)[1] < _NOWHERE or plan in self._too_large:
            return
        self._too_large.add(plan)
        for again in (False, True):
            less = plan
            while (less.moved or less.sends) and self._add(less)[1] == _NOWHERE:
                less = self._tree.moving_less(less, again)
            self._add(less)

    def _vary_ahead(self) -> None:
        """Fetch fewer values ahead, where plans move some."""
        for _, _, plan in self.frontier():
            if plan.moved or plan.sends:
                for ahead in AHEAD:
                    self._add(replace(plan, ahead=ahead))

    def _mix_hull(self) -> None:
        """Mix along the hull, and once more along what that makes of it.

        Steps between plans far apart go nearly straight, so that they lie below the frontier
        wherever that bulges: at a third of gpt2-12L's peak they halve the recomputation.
        """
        for _ in range(2):
            self._mix(_hull(self.frontier()))

    def _mix(self, entries: Iterable[Entry]) -> None:
        """Go from each plan to the next slower one, slot by slot."""
        for (_, _, fast), (_, _, slow) in pairwise(entries):
            slots = self._tree.slots(fast, slow)
            for order in (slots, slots[::-1]):
                plan = fast
                for slot in order:
                    plan = self._tree.swapped(plan, slow, slot)
                    self._add(plan)

    def _polish(self) -> None:
        """Keep single ops, those that save most time for their bytes first, where peaks allow."""
        frontier = self.frontier()
        step = max(len(frontier) // _POLISHED, 1)
        for index in range(step, len(frontier), step):
            self._keep_more(frontier[index][2], frontier[index - step][1])
        _, least, plan = frontier[-1]
        self._keep_more(plan, least)

    def _keep_more(self, plan: EagerPlan, ceiling: int) -> None:
        """Keep what a peak of ``ceiling`` bytes has room for."""
        for op in self._tree.keepable(plan):
            more = replace(plan, kept=plan.kept | {op})
            if self._add(more)[1] <= ceiling:
                plan = more


def _hull(frontier: Iterable[Entry]) -> list[Entry]:
    """The entries of a frontier on its lower convex hull, fastest first."""
    found: list[Entry] = []
    for entry in frontier:
        while len(found) > 1 and not _below(found[-2], found[-1], entry):
            found.pop()
        found.append(entry)
    return found


def _below(before: Entry, entry: Entry, after: Entry) -> bool:
    """Whether an entry lies below the straight line between its neighbours."""
    (time_s, peak, _), (at_s, at, _), (later_s, least, _) = before, entry, after
    return (at_s - time_s) * (peak - least) < (later_s - time_s) * (peak - at)


def _order(item: tuple[EagerPlan, tuple[float, int]]) -> tuple[float | int | list[int], ...]:
    plan, (time_s, peak) = item
    parts = plan.regions, plan.kept, plan.sends, plan.moved, plan.shards
    return time_s, peak, plan.ahead, *map(sorted, parts)
