"""The modules of an eager step as a tree, and the best choice among them as if bytes added up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property

from ckpt_pass.planner.eager_parts import EagerPlan
from ckpt_pass.planner.eager_problem import EagerProblem

#: Prices tried, in seconds a byte: from what keeps nearly everything to what keeps nothing.
_PRICE_STEPS = 24
#: How far they reach above what the dearest op is worth, so that a region pays that frees few bytes
#: (on BERT and ViT of tests/zoo the least peaks are lower for it by 6 and 2 %), and at the least
#: below it: a factor of two a step was enough with 16 steps and the roofline's times.
_HIGHEST_PRICE = 4.0
_LOWEST_PRICE = 2.0**-15
#: Of the prices at which single regions pay, so many at most beside those, each a little higher.
_MOST_ABOVE = 8
_JUST_ABOVE = 1.001
#: Limits on the bytes that one region may make again.
_LIMIT_STEPS = 10
#: How many values may be fetched ahead: none needs the least memory, two hide copies.
AHEAD = (2, 1, 0)


class Tree:
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

        ranks = problem.ranks
        self._gather_s = [
            sum(ranks.gather_s(whole) for _, _, whole in region.parts) if ranks is not None else 0.0
            for region in self._regions
        ]
        #: What is free where ranks share out a region's arguments.
        self._freed_bytes = [
            sum(nbytes[s] - part for s, part, _ in region.parts) for region in self._regions
        ]

    def _saved_storages(self, index: int) -> set[int]:
        values = self._problem.values[slice(*self._regions[index].values)]
        return {value.storage for value in values if value.storage >= 0}

    def _must_keep(self, index: int) -> list[int]:
        """The ops that a region keeps whatever they are worth: they must not run twice."""
        region = self._regions[index]
        inside = range(region.ops[0], region.ops[0] + region.needed)
        return [op for op in inside if self._problem.ops[op].must_keep and self._made[op]]

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
        """Prices of a held byte, from more than any op or region is worth to nearly nothing."""
        if not self._ratios:
            return self._paying_above(0.0) or [1.0]
        dearest, cheapest = max(self._ratios.values()), min(self._ratios.values())
        lowest = min(cheapest, dearest * _LOWEST_PRICE)
        highest = dearest * _HIGHEST_PRICE
        step = (lowest / highest) ** (1 / (_PRICE_STEPS - 1))
        above = self._paying_above(highest)
        return above + [highest * step**number for number in range(_PRICE_STEPS)]

    def _paying_above(self, price: float) -> list[float]:
        """Some of the prices above one at which regions begin to pay, the highest among them.

        A region is dearer than all ops that may be kept where those that take time may not be: a
        product that is written into later, say.
        """
        freed = [a - b for a, b in zip(self._saved_bytes, self._argument_bytes, strict=True)]
        pays = (self._rerun_time(i, ()) / nbytes for i, nbytes in enumerate(freed) if nbytes > 0)
        found = sorted({_JUST_ABOVE * one for one in pays if one >= price}, reverse=True)
        return found[:: -(-len(found) // _MOST_ABOVE) or 1]

    def limits(self) -> list[int]:
        """Limits on what one region makes again, among the regions' own sizes."""
        sizes = sorted(set(self._saved_bytes))
        step = max(len(sizes) // _LIMIT_STEPS, 1)
        return sorted({*sizes[::step], *sizes[-1:]})

    def best(
        self, price: float, limit: int, waited: float | None = None, shares: bool = False
    ) -> EagerPlan:
        """The best choice at a price, among regions that make no more than ``limit`` again.

        Args:
            price: of a held byte.
            limit: on bytes.
            waited: the share of copies that is waited for; ``None`` where nothing moves.
            shares: whether ranks may share out what regions are given.
        """
        regions: set[int] = set()
        kept: set[int] = set()
        moved: set[int] = set()
        sends: set[int] = set()
        shards: set[int] = set()
        costs: dict[int, tuple[str, list[int]]] = {}
        total: dict[int, float] = {}
        for index in reversed(range(len(self._regions))):
            children = sum(total[child] for child in self._children[index])
            plain = price * self._own_bytes[index] + children
            must = self._must_keep(index)
            keeps = must + [
                op for op in self._keepable_in(index) if self._ratios[op] > price and op not in must
            ]
            again = self._rerun_time(index, keeps)
            held = sum(self._made[op] for op in keeps) + self._argument_bytes[index]
            whole = again + price * held
            found = [(plain, "")]
            if self._saved_bytes[index] <= limit:
                found.append((whole, "again"))
                if waited is not None and self._sent_bytes[index]:
                    away = waited * self._sent_s[index] - price * self._sent_bytes[index]
                    found.append((whole + away, "again, sends"))
                if shares and self._freed_bytes[index]:
                    apart = self._gather_s[index] - price * self._freed_bytes[index]
                    found.append((whole + apart, "again, shards"))
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
                sends |= {index} if what == "again, sends" else set()
                shards |= {index} if what == "again, shards" else set()
            elif what == "moved":
                moved.add(index)
            else:
                todo += self._children[index]
        ahead = AHEAD[0] if moved or sends else 0
        return EagerPlan(
            frozenset(regions),
            frozenset(kept),
            frozenset(sends),
            frozenset(moved),
            ahead,
            frozenset(shards),
        )

    def sharing(self, plan: EagerPlan) -> EagerPlan:
        """A plan with all that ranks may share out of its regions' arguments."""
        return replace(plan, shards=frozenset(i for i in plan.regions if self._freed_bytes[i]))

    def sharing_less(self, plan: EagerPlan) -> list[EagerPlan]:
        """A plan without one of its shares, for each: those first that free least a second."""
        dear = sorted(plan.shards, key=lambda i: (-self._gather_s[i] / self._freed_bytes[i], i))
        return [replace(plan, shards=plan.shards - {index}) for index in dear]

    def moving_less(self, plan: EagerPlan, again: bool) -> EagerPlan:
        """A plan without the last of its moves.

        Args:
            plan: it moves something.
            again: whether a module that does not move any more runs again.
        """
        last = max(plan.moved | plan.sends, key=lambda index: self._regions[index].ops)
        regions = plan.regions | ({last} if again else set())
        kept = plan.kept | set(self._must_keep(last) if again else ())
        return replace(
            plan, regions=regions, kept=kept, sends=plan.sends - {last}, moved=plan.moved - {last}
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
        return EagerPlan(
            inside(plan.regions),
            kept,
            inside(plan.sends),
            inside(plan.moved),
            shards=inside(plan.shards),
        )

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
            (plan.shards - mine.shards) | theirs.shards,
        )
