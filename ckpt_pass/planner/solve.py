"""From a problem and a budget to a solution.

The solver makes a pool of plans that does not depend on the budget: uniform cuts at many prices,
with and without the borders of the layers pinned, and mixes of them over the chain of layers
(:mod:`ckpt_pass.planner.chain`) for a grid of peaks. Each is simulated, and the cheapest one that
the simulator finds within the budget is taken. As the pool is the same for every budget, a larger
budget never gives a slower plan.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ckpt_pass.errors import CkptPassError
from ckpt_pass.planner.chain import best_mix, menus
from ckpt_pass.planner.cut import CutGraph
from ckpt_pass.planner.liveness import MemoryProfile, simulate
from ckpt_pass.planner.problem import Problem, needed_by

# Prices of a saved byte, as powers of two of the forward's mean time for each byte it makes: from
# "save whatever saves time" to "save only what is all but free" in the models of the test zoo.
_PRICE_EXPONENTS = range(-10, 11)
# Peaks for which a mix of layers is sought, from the least peak of a uniform cut to the peak
# without recomputation; 96 steps are 1 % to 1.5 % apart in the reference models.
_GRID = 96
# A mix may need less than its menu entries say, and then reaches below the least uniform cut.
_BELOW = 0.9


class InfeasibleBudgetError(CkptPassError):
    """No plan that the solver found fits the budget.

    Attributes:
        least_feasible_bytes: the least peak that it found; planning with that number works.
    """

    def __init__(self, budget_bytes: int, least_feasible_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.least_feasible_bytes = least_feasible_bytes
        super().__init__(
            f"No plan fits a peak of {budget_bytes:,} bytes; the least that was found is "
            f"{least_feasible_bytes:,} bytes. Give that budget or more, or make the step smaller "
            "(batch, sequence length); MUST_SAVE tags and policies that save also raise the least."
        )


@dataclass(frozen=True)
class Solution:
    """What to save, and what that costs; the numbers come from the simulator.

    Attributes:
        saved: indices of the ops whose results are saved.
        profile: bytes over time.
        recompute_time_s, recompute_flops: of all forward ops that run again.
        solver: what found it, in words.
    """

    saved: frozenset[int]
    profile: MemoryProfile
    recompute_time_s: float
    recompute_flops: int
    solver: str

    @property
    def peak_bytes(self) -> int:
        """The simulated peak."""
        return self.profile.peak_bytes


def evaluate(problem: Problem, saved: Iterable[int], solver: str = "given") -> Solution:
    """Simulate a saved set; what the backward does not read is left out of it."""
    keep = frozenset(saved)
    needed = needed_by(problem.ops, problem.backward_outputs, keep)
    direct = {i for index in needed for i in problem.ops[index].inputs}
    keep &= direct | set(problem.backward_outputs)
    profile = simulate(problem, keep)
    again = [i for i in profile.schedule[profile.forward_length :] if problem.ops[i].forward]
    return Solution(
        saved=keep,
        profile=profile,
        recompute_time_s=sum(problem.ops[i].time_s for i in again),
        recompute_flops=sum(problem.ops[i].flops for i in again),
        solver=solver,
    )


def without_recompute(problem: Problem) -> Solution:
    """The step that recomputes nothing that takes time."""
    return evaluate(problem, CutGraph(problem, ()).solve(0.0), "no recomputation")


def solve(problem: Problem, budget_bytes: int, borders: Collection[int] = ()) -> Solution:
    """Find the fastest plan that the solver knows within a budget.

    Args:
        problem: the step; ``region`` of its ops makes the chain of layers.
        budget_bytes: the most bytes above what was allocated when the step began.
        borders: ops whose results cross from one layer to the next.

    Raises:
        InfeasibleBudgetError: nothing in the pool fits.
    """
    pool = plan_pool(problem, borders)
    fitting = [plan for plan in pool if plan.peak_bytes <= budget_bytes]
    if not fitting:
        raise InfeasibleBudgetError(budget_bytes, min(plan.peak_bytes for plan in pool))
    return min(fitting, key=_cheapest_first)


def _cheapest_first(plan: Solution) -> tuple[float, int, int, list[int]]:
    """Time, then flops, then peak; the saved set itself makes the order total."""
    return plan.recompute_time_s, plan.recompute_flops, plan.peak_bytes, sorted(plan.saved)


def plan_pool(problem: Problem, borders: Collection[int]) -> list[Solution]:
    """Every plan that the solver considers, whatever the budget."""
    pool = _Pool(problem)
    pool.add(without_recompute(problem).saved, "no recomputation")
    made = sum(problem.storage_bytes[s] for op in problem.ops if op.forward for s in op.makes)
    price = sum(op.time_s for op in problem.ops if op.forward) / max(made, 1)
    for pinned in (tuple(borders), ()):
        graph = CutGraph(problem, pinned)
        for exponent in _PRICE_EXPONENTS:
            pool.add(graph.solve(price * 2.0**exponent), "uniform cut")
    uniform = list(pool.plans.values())
    menu_of = menus(problem, [(plan.saved, plan.profile) for plan in uniform])
    low = _BELOW * min(plan.peak_bytes for plan in uniform)
    high = max(plan.peak_bytes for plan in uniform)
    for step in range(_GRID + 1):
        peak = low * (high / low) ** (step / _GRID) if low else 0.0
        mix = best_mix(menu_of, int(peak))
        if mix is not None:
            pool.add(mix, "chain of layers")
    return list(pool.plans.values())


class _Pool:
    """Plans by saved set, each simulated once."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._seen: set[frozenset[int]] = set()
        self.plans: dict[frozenset[int], Solution] = {}

    def add(self, saved: frozenset[int], solver: str) -> None:
        """Simulate a saved set, unless that was done."""
        if saved not in self._seen:
            self._seen.add(saved)
            plan = evaluate(self._problem, saved, solver)
            self.plans.setdefault(plan.saved, plan)
