"""What to save, to recompute and to move, decided together for a budget and a link.

Moving a storage makes room over the stretch in which it is away, so that a plan without moves for
a looser budget, made to fit by moving part of what it saves, recomputes less than the best plan
without a link. How loose is best the clock says: all plans of the layered solver's pool are made
to fit in several ways, from the one that recomputes nothing to the one that moves nothing, and so
are the plans of fixed rules. A plan is left out where its compute time and the least time that the
link needs for its bytes above the budget are more than another plan takes. The best are improved
by a local search (:mod:`ckpt_pass.planner.offload_improve`). No plan that is found is slower by the
clock than the best one without a link, than those that only move, or than the fixed rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from ckpt_pass.planner.ground import Ground
from ckpt_pass.planner.link import Link
from ckpt_pass.planner.lower import Curve, lowered
from ckpt_pass.planner.offload_bound import overhead_bound
from ckpt_pass.planner.offload_improve import Joint, Search
from ckpt_pass.planner.offload_rules import choices, everything, largest_first, layers_but_the_last
from ckpt_pass.planner.problem import Problem
from ckpt_pass.planner.solution import (
    InfeasibleBudgetError,
    Solution,
    evaluate,
    without_recompute,
)
from ckpt_pass.planner.solve import Pool

# Plans that the local search begins with.
_STARTS = 3
# Plans that are made to fit although they cannot be best as they are: the search may improve them.
_SPARE = 6
# Ops simulated in the local search, all plans together, and in the descent before it.
_WORK = 300_000
_LOWER_WORK = 300_000


def solve_with_link(
    pool: Pool, budget_bytes: int, link: Link, known: Solution | None = None
) -> Solution:
    """Find the fastest plan with moves within a budget.

    Args:
        pool: the plans without moves that are considered.
        budget_bytes: the most bytes on the device above what was allocated when the step began.
        link: what moves values.
        known: the best plan without moves, where one is known that fits.

    Returns:
        The plan, with times by the clock, and a lower bound on the recompute time and the waiting
        of all plans.

    Raises:
        InfeasibleBudgetError: nothing that was found fits.
    """
    problem = pool.problem
    plans = [*pool.plans.values(), *([] if known is None else [known])]
    grounds = [Ground(problem, plan, link) for plan in plans]
    grounds += _descents(Ground(problem, without_recompute(problem), link), budget_bytes)
    found = sorted(_candidates(grounds, budget_bytes, known), key=lambda joint: joint.rank)
    if not found:
        least = min(ground.least_bytes for ground in grounds)
        raise InfeasibleBudgetError(budget_bytes, least)
    starts = _starts(found, known)
    best = _searched(starts, budget_bytes).solution(budget_bytes)
    bound_s = min(overhead_bound(problem, budget_bytes, link, best), best.overhead_s)
    status = "optimal" if best.overhead_s <= bound_s else "feasible"
    return replace(best, lower_bound_s=bound_s, status=status)


def _descents(plain: Ground, budget_bytes: int) -> list[Ground]:
    """Where moving alone is not enough: with as little recomputation as lowers the peak."""
    problem, link = plain.problem, plain.link

    def curve(plan: Solution) -> Curve:
        ground = plain if plan is plain.plan else Ground(problem, plan, link)
        forward, backward = ground.left(ground.all_away, 0)
        found = Curve([*forward.tolist(), *backward.tolist()])
        rows, place = ground.rows, found.peak_index
        behind = place - len(forward)
        away = ground.all_away & (rows.last < place) & (rows.first > behind)
        elsewhere = away | (rows.made > place) | (rows.end < behind)
        return Curve(found.bytes_at, frozenset(rows.storage[elsewhere].tolist()))

    plan, evaluations = plain.plan, _LOWER_WORK // max(len(problem.ops), 1)
    plans = []
    for begin in (plan, _without_idle(problem, plan, curve(plan))):
        plans += lowered(problem, begin, evaluations // 2, curve, budget_bytes)
    return [Ground(problem, plan, link) for plan in plans]


def _without_idle(problem: Problem, plan: Solution, curve: Curve) -> Solution:
    """A plan that saves nothing that lies idle at its peak: it may be dropped there then.

    What is read before the peak and again after it cannot be away at the peak.
    """
    at = problem.ops[plan.profile.schedule[curve.peak_index]]
    idle = {
        index
        for index in plan.saved - problem.bound
        if not set(problem.ops[index].holds) & {*at.touches, *curve.away}
    }
    return evaluate(problem, plan.saved - idle, plan.solver, plan.drops)


def _starts(found: Sequence[Joint], known: Solution | None) -> list[Joint]:
    """The best of what was found, of different plans; that which moves nothing is among them."""
    best_of = {id(joint.ground): joint for joint in reversed(found)}
    ranked = sorted(best_of.values(), key=lambda joint: joint.rank)
    still = [joint for joint in ranked[_STARTS:] if joint.ground.plan is known]
    return [*ranked[:_STARTS], *still]


def _searched(starts: Sequence[Joint], budget_bytes: int) -> Joint:
    """The best that local searches find: of those from all starts the better half goes on."""
    count = len(starts[0].ground.problem.ops)
    searches = [Search(start, budget_bytes) for start in starts]
    rounds = len(starts).bit_length()
    for _ in range(rounds):
        evaluations = _WORK // (max(count, 1) * rounds * len(searches))
        for search in searches:
            search.run(evaluations)
        searches.sort(key=lambda search: search.best.rank)
        searches = searches[: (len(searches) + 1) // 2]
    return searches[0].best


def _candidates(
    grounds: Iterable[Ground], budget_bytes: int, known: Solution | None
) -> Iterator[Joint]:
    """Plans made to fit, those that promise most first: all that can be best, and some more."""
    promised = sorted(
        ((_least_time_s(g, budget_bytes), k, g) for k, g in enumerate(grounds)),
        key=lambda entry: entry[:2],
    )
    best_s, spare = float("inf"), _SPARE
    for promise_s, _, ground in promised:
        plain = ground.plan is without_recompute(ground.problem)
        if promise_s > best_s and not plain and ground.plan is not known:
            spare -= 1
            if spare < 0:
                continue
        for joint in _ways(ground, budget_bytes, plain=plain):
            best_s = min(best_s, joint.time_s)
            yield joint


def _ways(ground: Ground, budget_bytes: int, *, plain: bool) -> Iterator[Joint]:
    nothing = ground.must  # more than need be is not moved
    masks = []
    if ground.covers(nothing, budget_bytes):
        masks.append((nothing, ground.plan.solver))
    else:
        label = "offload only" if plain else f"{ground.plan.solver}, then offload"
        masks += [(mask, label) for mask in choices(ground, budget_bytes)]
    if plain:
        for rule in (largest_first, layers_but_the_last, everything):
            mask = rule(ground, budget_bytes)
            if mask is not None:
                masks.append((mask, rule.__name__.replace("_", " ")))
    for mask, label in masks:
        time_s = ground.step_time_s(mask, budget_bytes)
        if time_s < float("inf"):
            yield Joint(ground, mask, time_s, label)


def _least_time_s(ground: Ground, budget_bytes: int) -> float:
    """No set of moves makes the step of a plan shorter: what is over must have been copied.

    By the time of an op at which the plan is over its budget, that many bytes are out; and they
    come back between its time and the end.
    """
    link = ground.link
    ahead = ground.forward_bytes - budget_bytes
    behind = ground.backward_bytes - budget_bytes
    begins = np.array([0.0, *ground.ends_s])[:-1]
    out = np.where(ahead > 0, ahead / link.out_bytes_per_s - begins, 0.0)
    left_s = ground.compute_s - ground.forward_s - np.array(ground.starts_s)
    back = np.where(behind > 0, behind / link.in_bytes_per_s - left_s, 0.0)
    all_out = int(behind.max(initial=0)) / link.out_bytes_per_s - ground.forward_s
    out_s = max(0.0, float(out.max(initial=0.0)), all_out)
    return ground.compute_s + out_s + max(0.0, float(back.max(initial=0.0)))
