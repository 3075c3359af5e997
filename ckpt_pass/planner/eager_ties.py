"""Modules that a step calls several times: regions in all of their calls, or in none.

What becomes of a module is written on the module, not on one of its calls (a layer that a model
goes through again and again, as in Universal Transformers or ALBERT). So the calls of one are tied:
the choice of any of them is made the choice of all, and they keep the same ops.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from ckpt_pass.planner.eager_parts import EagerPlan
from ckpt_pass.planner.eager_problem import EagerProblem


class Ties:
    """The candidates that are calls of one module.

    Args:
        problem: the step.
    """

    def __init__(self, problem: EagerProblem) -> None:
        self._problem = problem
        by_name: dict[str, list[int]] = defaultdict(list)
        for index, region in enumerate(problem.regions):
            by_name[region.name].append(index)
        self._calls = [tuple(by_name[region.name]) for region in problem.regions]
        self._any = any(len(calls) > 1 for calls in self._calls)

    def tied(self, plan: EagerPlan) -> EagerPlan:
        """The plan nearest to one that does with all calls of a module what it does with one.

        Of regions that lie in each other then, the larger ones stay.
        """
        if not self._any:
            return plan
        regions: set[int] = set()
        taken = set(plan.moved)
        for index in sorted(plan.regions, key=self._size, reverse=True):
            calls = self._calls[index]
            if index not in regions and not any(self._meets(call, taken) for call in calls):
                regions.update(calls)
                taken.update(calls)
        kept: set[int] = set()
        for index in regions:
            kept |= self._kept(plan, index)
        return replace(
            plan,
            regions=frozenset(regions),
            kept=frozenset(kept),
            sends=plan.sends & regions,
            shards=plan.shards & regions,
        )

    def _size(self, index: int) -> tuple[int, int]:
        first, last = self._problem.regions[index].ops
        return last - first, -first

    def _meets(self, index: int, others: set[int]) -> bool:
        first, last = self._problem.regions[index].ops
        spans = (self._problem.regions[other].ops for other in others)
        return any(first < end and begin < last for begin, end in spans)

    def _kept(self, plan: EagerPlan, index: int) -> set[int]:
        """What a call keeps: what any of the module's calls does, as far as all of them may."""
        same = zip(*map(self._ops_of, self._calls[index]), strict=True)
        kept = {turn for turn, ops in enumerate(same) if self._may_all(ops, plan)}
        return {op for turn, op in enumerate(self._ops_of(index)) if turn in kept}

    def _may_all(self, same: tuple[int, ...], plan: EagerPlan) -> bool:
        """Whether any of the ops that are one op of a module is kept, and all may be."""
        ops = (self._problem.ops[op] for op in same)
        return not plan.kept.isdisjoint(same) and all(op.keepable or op.must_keep for op in ops)

    def _ops_of(self, index: int) -> list[int]:
        """The ops of a call that every call of its module runs."""
        ops = self._problem.ops
        return [op for op in range(*self._problem.regions[index].ops) if not ops[op].cached]
