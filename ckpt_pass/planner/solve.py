"""From a problem and a budget to a solution.

The layered solver makes a pool of plans that does not depend on the budget: uniform cuts at many
prices, with and without the borders of the layers pinned, and mixes of them over the chain of
layers (:mod:`ckpt_pass.planner.chain`) for a grid of peaks. For the budget itself come one more mix
and the cuts at the prices of moments that make the lower bound (:mod:`ckpt_pass.planner.bound`).
Each is simulated; the cheapest ones within the budget are improved
(:mod:`ckpt_pass.planner.improve`), and the best is taken.
"""

from __future__ import annotations

from collections.abc import Collection
from copy import copy
from dataclasses import replace

from ckpt_pass.planner.bound import lower_bound
from ckpt_pass.planner.chain import Chain, Mix
from ckpt_pass.planner.cut import CutGraph, mean_price
from ckpt_pass.planner.improve import improved
from ckpt_pass.planner.lower import lowered
from ckpt_pass.planner.menu import Menus
from ckpt_pass.planner.problem import Problem
from ckpt_pass.planner.solution import (
    InfeasibleBudgetError,
    Solution,
    cheapest_first,
    evaluate,
    without_recompute,
)

# Prices of a saved byte, as powers of two of the forward's mean time for each byte it makes: from
# "save whatever saves time" to "save only what is all but free" in the models of the test zoo.
_PRICE_EXPONENTS = range(-10, 11)
# Peaks for which a mix of layers is sought, from below the least peak of a uniform cut to the peak
# without recomputation; 32 steps are 3 % to 5 % apart in the reference models.
_GRID = 32
# Between the last peak without a mix and the first with one: to 0.1 % of the peak.
_HALVINGS = 6
# Recomputing again and again reached 0.86 of the least uniform cut in the reference models; a
# region alone never went below half.
_BELOW = 0.5
# Descents to the least peak, from the lowest plans of the pool, and ops simulated in each: with
# four times as many no least peak of the zoo's models was lower.
_DESCENTS = 2
_LOWER_WORK = 400_000
# Steps above this size go without: there the layers' own ways down reach as far (llama-16L, 3,329
# ops: 64.65 MB both ways), and a descent takes a second.
_LOWER_OPS = 1_000
# How often a mix for a budget is asked for with a little less, because it came out above.
_TRIES = 4
# Of the cuts that the bound met, the ones at the best prices are simulated.
_LAST_CUTS = 20
# Ops simulated in the local search, all plans together: some 0.3 s on a server core.
_WORK = 250_000


def solve(problem: Problem, budget_bytes: int, borders: Collection[int] = ()) -> Solution:
    """Find the fastest plan that the layered solver knows within a budget.

    Args:
        problem: the step; ``region`` of its ops makes the chain of layers.
        budget_bytes: the most bytes above what was allocated when the step began.
        borders: ops whose results cross from one layer to the next.

    Returns:
        The plan, with a lower bound on the recompute time of all plans.

    Raises:
        InfeasibleBudgetError: nothing that was found fits.
    """
    return solve_from(Pool.of(problem, borders), budget_bytes)


def solve_from(pool: Pool, budget_bytes: int) -> Solution:
    """The same with the plans that are considered for every budget made already."""
    problem = pool.problem
    found = pool.best(budget_bytes)
    if found is None:
        raise InfeasibleBudgetError(budget_bytes, pool.least_bytes)
    bound = lower_bound(problem, budget_bytes, found)
    cuts = [evaluate(problem, saved, "priced moments") for saved in bound.saved[-_LAST_CUTS:]]
    fitting = sorted((c for c in cuts if c.peak_bytes <= budget_bytes), key=cheapest_first)
    evaluations = _WORK // max(len(problem.ops), 1)
    starts = [found, *fitting[:1]]
    ends = [improved(problem, start, budget_bytes, evaluations) for start in starts]
    best = min(ends, key=cheapest_first)
    closed = best.recompute_time_s <= bound.time_s
    return replace(best, lower_bound_s=bound.time_s, status="optimal" if closed else "feasible")


class Pool:
    """The plans that the layered solver considers, each simulated once.

    Args:
        problem: the step.
        borders: ops whose results cross from one layer to the next.
    """

    def __init__(self, problem: Problem, borders: Collection[int]) -> None:
        self.problem = problem
        self.plans: dict[object, Solution] = {}
        self._cuts: dict[frozenset[int], Solution] = {}  # many prices give the same
        self._mixes: dict[Mix, Solution] = {}
        plain = without_recompute(problem)
        self._add(plain)
        price = mean_price(problem)
        pinned = [self._cut(borders, price * 2.0**e) for e in _PRICE_EXPONENTS]
        for exponent in _PRICE_EXPONENTS if borders else ():
            self._cut((), price * 2.0**exponent)
        unique = {plan.saved: plan for plan in (plain, *pinned)}
        self._chain = Chain(problem, Menus(problem, list(unique.values()), borders))
        low, high = _BELOW * self.least_bytes, plain.peak_bytes
        grid = [
            int(low * (high / low) ** (step / _GRID)) for step in range(_GRID + 1 if low else 0)
        ]
        mixed = [self._mix(peak_bytes) is not None for peak_bytes in grid]
        first = mixed.index(True) if True in mixed else 0
        if first:
            self._lowest_mix(grid[first - 1], grid[first])
        if len(problem.ops) <= _LOWER_OPS:
            self._descend()

    def _lowest_mix(self, without: int, within: int) -> None:
        """Look for the least peak of a mix between one for which there is none and the next."""
        for _ in range(_HALVINGS):
            middle = (without + within) // 2
            if self._mix(middle) is None:
                without = middle
            else:
                within = middle

    def _descend(self) -> None:
        lowest = sorted(self.plans.values(), key=lambda p: (p.peak_bytes, *cheapest_first(p)))
        for plan in lowest[:_DESCENTS]:
            for lower in lowered(self.problem, plan, _LOWER_WORK // max(len(self.problem.ops), 1)):
                self._add(lower)

    @classmethod
    def of(cls, problem: Problem, borders: Collection[int]) -> Pool:
        """The pool of a problem that is asked for several budgets: what these add is not shared."""
        name = f"pool {sorted(borders)}"
        found = copy(problem.derived(name, lambda one: cls(one, borders)))
        found.plans = dict(found.plans)
        return found

    @property
    def least_bytes(self) -> int:
        """The least peak of all plans."""
        return min(plan.peak_bytes for plan in self.plans.values())

    def best(self, budget_bytes: int) -> Solution | None:
        """The cheapest plan within a budget, if there is one."""
        asked = budget_bytes
        for _ in range(_TRIES):
            mix = self._mix(asked)
            if mix is None or mix.peak_bytes <= budget_bytes:
                break
            asked -= mix.peak_bytes - budget_bytes
        fitting = [plan for plan in self.plans.values() if plan.peak_bytes <= budget_bytes]
        return min(fitting, key=cheapest_first, default=None)

    def _cut(self, pinned: Collection[int], price: float) -> Solution:
        saved = frozenset(CutGraph.of(self.problem, pinned).solve(price))
        if saved not in self._cuts:
            self._cuts[saved] = self._add(evaluate(self.problem, saved, "uniform cut"))
        return self._cuts[saved]

    def _mix(self, peak_bytes: int) -> Solution | None:
        mix = self._chain.best_mix(peak_bytes, spans=False)
        if mix is None:  # spans cost a second run through their regions
            mix = self._chain.best_mix(peak_bytes, spans=True)
        if mix is None:
            return None
        if mix not in self._mixes:
            made = evaluate(self.problem, mix.saved, "chain of layers", mix.drops)
            self._mixes[mix] = self._add(made)
        return self._mixes[mix]

    def _add(self, plan: Solution) -> Solution:
        return self.plans.setdefault((plan.saved, plan.drops), plan)
