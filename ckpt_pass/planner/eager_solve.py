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

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from ckpt_pass.planner.eager_parts import EagerPlan
from ckpt_pass.planner.eager_problem import EagerProblem, EagerProfile
from ckpt_pass.planner.solution import InfeasibleBudgetError

#: Prices tried, in seconds a byte: from what keeps nearly everything to what keeps nothing.
_PRICE_STEPS = 24
#: How far they reach above what the dearest op is worth, so that a region pays that frees few bytes
#: (on BERT and ViT of tests/zoo the least peaks are lower for it by 6 and 2 %), and at the least
#: below it: a factor of two a step was enough with 16 steps and the roofline's times.
_HIGHEST_PRICE = 4.0
_LOWEST_PRICE = 2.0**-15
#: Limits on the bytes that one region may make again.
_LIMIT_STEPS = 10
#: Plans of the frontier to which single ops are added.
_POLISHED = 24
#: What of the seconds of copies is taken to be waited for.
_WAITED_SHARES = (0.0, 0.02, 0.2, 1.0)
#: How many values may be fetched ahead: none needs the least memory, two hide copies.
_AHEAD = (2, 1, 0)
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
        self._tree = _Tree(problem)
        self.plans: dict[EagerPlan, tuple[float, int]] = {}
        self._add(EagerPlan())
        for limit in self._tree.limits():
            for price in self._tree.prices():
                self._add(self._tree.best(price, limit))
        self._mix_hull()
        self._polish()
        self._mix_hull()
        self._mix(self.frontier())
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
        known = self.plans.get(plan)
        if known is None:
            profile = self._problem.simulate(plan)
            link = self._problem.link
            fits = link is None or link.may_hold(profile.away_bytes)
            peak = profile.peak_bytes if fits else _NOWHERE
            known = self.plans[plan] = profile.overhead_s, peak
        return known

    def _move(self) -> None:
        """Let candidates move at all prices; by the tightest and the loosest limit."""
        limits = self._tree.limits()
        for share in _WAITED_SHARES:
            for limit in dict.fromkeys((0, limits[len(limits) // 2], limits[-1])):
                for price in self._tree.prices():
                    plan = self._tree.best(price, limit, share)
                    self._add(plan)

    def _vary_ahead(self) -> None:
        """Fetch fewer values ahead, where plans move some."""
        for _, _, plan in self.frontier():
            if plan.moved or plan.sends:
                for ahead in _AHEAD:
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
    chosen = (sorted(part) for part in (plan.regions, plan.kept, plan.sends, plan.moved))
    return time_s, peak, plan.ahead, *chosen


class _Tree:
    """The candidates with what they cost, taken as if bytes added up."""

    def __init__(self, problem: EagerProblem) -> None:
        self._problem = problem
        self._regions = problem.regions
        self._children: list[list[int]] = [[] for _ in self._regions]
        self._roots: list[int] = []
        for index, region in enumerate(self._regions):
            (self._children[region.parent] if region.parent >= 0 else self._roots).append(index)
        self._saved = [self._saved_storages(index) for index in range(len(self._regions))]
        nbytes = [storage.nbytes for storage in problem.storages]
        self._saved_bytes = [sum(nbytes[s] for s in saved) for saved in self._saved]
        self._argument_bytes = [
            sum(nbytes[s] for s in region.arguments) + region.extra_bytes
            for region in self._regions
        ]
        self._own_bytes = []
        for index in range(len(self._regions)):
            below: set[int] = set().union(*(self._saved[child] for child in self._children[index]))
            self._own_bytes.append(sum(nbytes[s] for s in self._saved[index] - below))
        self._made = [sum(nbytes[s] for s in op.makes) for op in problem.ops]
        self._sent_bytes = [sum(nbytes[s] for s in region.sent) for region in self._regions]
        goes = [{problem.values[n].storage for n in region.moves} for region in self._regions]
        self._moved_bytes = [sum(nbytes[s] for s in found) for found in goes]
        link = problem.link
        self._copies_s = [
            sum(link.in_s(nbytes[s]) for s in found) if link is not None else 0.0 for found in goes
        ]
        self._sent_s = [
            sum(link.in_s(nbytes[s]) for s in region.sent) if link is not None else 0.0
            for region in self._regions
        ]

    def _saved_storages(self, index: int) -> set[int]:
        values = self._problem.values[slice(*self._regions[index].values)]
        return {value.storage for value in values if value.storage >= 0}

    def _keepable_in(self, index: int) -> Iterator[int]:
        region = self._regions[index]
        for op in range(region.ops[0], region.ops[0] + region.needed):
            found = self._problem.ops[op]
            if found.keepable and found.time_s > 0 and self._made[op]:
                yield op

    @cached_property
    def _ratios(self) -> dict[int, float]:
        """Seconds saved a byte kept, of each op that a region may keep."""
        ops = {op for index in range(len(self._regions)) for op in self._keepable_in(index)}
        return {op: self._problem.ops[op].time_s / self._made[op] for op in sorted(ops)}

    def prices(self) -> list[float]:
        """Prices of a held byte, from more than any op is worth to nearly nothing."""
        if not self._ratios:
            return [1.0]
        dearest, cheapest = max(self._ratios.values()), min(self._ratios.values())
        lowest = min(cheapest, dearest * _LOWEST_PRICE)
        highest = dearest * _HIGHEST_PRICE
        step = (lowest / highest) ** (1 / (_PRICE_STEPS - 1))
        return [highest * step**number for number in range(_PRICE_STEPS)]

    def limits(self) -> list[int]:
        """Limits on what one region makes again, among the regions' own sizes."""
        sizes = sorted(set(self._saved_bytes))
        step = max(len(sizes) // _LIMIT_STEPS, 1)
        return sorted({*sizes[::step], *sizes[-1:]})

    def best(self, price: float, limit: int, waited: float | None = None) -> EagerPlan:
        """The best choice at a price, among regions that make no more than ``limit`` again.

        Args:
            price: of a held byte.
            limit: on bytes.
            waited: the share of copies that is waited for; ``None`` where nothing moves.
        """
        regions: set[int] = set()
        kept: set[int] = set()
        moved: set[int] = set()
        sends: set[int] = set()
        costs: dict[int, tuple[str, list[int]]] = {}
        total: dict[int, float] = {}
        for index in reversed(range(len(self._regions))):
            children = sum(total[child] for child in self._children[index])
            plain = price * self._own_bytes[index] + children
            keeps = [op for op in self._keepable_in(index) if self._ratios[op] > price]
            again = self._rerun_time(index, keeps)
            held = sum(self._made[op] for op in keeps) + self._argument_bytes[index]
            whole = again + price * held
            found = [(plain, "")]
            if self._saved_bytes[index] <= limit:
                found.append((whole, "again"))
                if waited is not None and self._sent_bytes[index]:
                    away = waited * self._sent_s[index] - price * self._sent_bytes[index]
                    found.append((whole + away, "again, sends"))
            if waited is not None and self._moved_bytes[index]:
                stays = self._saved_bytes[index] - self._moved_bytes[index]
                found.append((waited * self._copies_s[index] + price * stays, "moved"))
            total[index], what = min(found)
            costs[index] = what, keeps
        todo = list(self._roots)
        while todo:
            index = todo.pop()
            what, keeps = costs[index]
            if what.startswith("again"):
                regions.add(index)
                kept.update(keeps)
                sends |= {index} if what != "again" else set()
            elif what == "moved":
                moved.add(index)
            else:
                todo += self._children[index]
        ahead = _AHEAD[0] if moved or sends else 0
        return EagerPlan(
            frozenset(regions), frozenset(kept), frozenset(sends), frozenset(moved), ahead
        )

    def _rerun_time(self, index: int, keeps: Iterable[int]) -> float:
        region = self._regions[index]
        ops = self._problem.ops[region.ops[0] : region.ops[0] + region.needed]
        time_s = sum(op.time_s for op in ops)
        found = list(keeps)
        time_s -= sum(self._problem.ops[op].time_s for op in found)
        return time_s + (len(ops) * self._problem.keeping_s if found else 0.0)

    def keepable(self, plan: EagerPlan) -> list[int]:
        """The ops that a plan's regions may still keep, the best first."""
        ops = {op for index in plan.regions for op in self._keepable_in(index)} - plan.kept
        return sorted(ops, key=lambda op: (-self._ratios[op], op))

    def slots(self, one: EagerPlan, other: EagerPlan) -> list[int]:
        """The largest regions of two plans in which they differ, in order."""
        chosen = one.regions | other.regions | one.moved | other.moved
        tops = [index for index in sorted(chosen) if not self._inside(index, chosen)]
        return [top for top in tops if self._part(one, top) != self._part(other, top)]

    def _inside(self, index: int, chosen: frozenset[int]) -> bool:
        parent = self._regions[index].parent
        while parent >= 0:
            if parent in chosen:
                return True
            parent = self._regions[parent].parent
        return False

    def _part(self, plan: EagerPlan, top: int) -> EagerPlan:
        """What a plan does inside a region."""
        first, last = self._regions[top].ops

        def inside(indices: frozenset[int]) -> frozenset[int]:
            spans = ((index, self._regions[index].ops) for index in indices)
            return frozenset(i for i, ops in spans if first <= ops[0] and ops[1] <= last)

        kept = frozenset(k for k in plan.kept if first <= k < last)
        return EagerPlan(inside(plan.regions), kept, inside(plan.sends), inside(plan.moved))

    def swapped(self, plan: EagerPlan, other: EagerPlan, top: int) -> EagerPlan:
        """A plan with what another does inside a region."""
        mine, theirs = self._part(plan, top), self._part(other, top)
        sends = (plan.sends - mine.sends) | theirs.sends
        moved = (plan.moved - mine.moved) | theirs.moved
        return EagerPlan(
            (plan.regions - mine.regions) | theirs.regions,
            (plan.kept - mine.kept) | theirs.kept,
            sends,
            moved,
            max(plan.ahead, other.ahead) if moved or sends else 0,
        )
