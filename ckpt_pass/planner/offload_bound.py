"""A lower bound on recompute time and waiting that holds with a link.

Without a link, prices of moments and optimistic lives bound the recompute time
(:mod:`ckpt_pass.planner.bound`): least cut less budget x prices. Storages that are moved, A bytes
together, take at most A bytes off every moment, so that with prices summing up to P the recompute
time is at least that value less P x A. But all A bytes leave during the forward, whose ops run for
F seconds, and come back during the backward, so that there is waiting of at least A / rate - F, and
of A / rate - (backward's ops + recompute time). The least over A of both together is the bound.

It is weak where it counts what the link could carry at best: every byte at every moment, from the
first op of the forward on. Where the link can hide as much as the plan without recomputation has
above its budget, it is 0.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckpt_pass.planner.bound import Held, held_at
from ckpt_pass.planner.link import Link
from ckpt_pass.planner.problem import Problem, needed_by
from ckpt_pass.planner.solution import Solution

Floats: TypeAlias = NDArray[np.float64]

# Subgradient steps; each is a minimum cut.
_STEPS = 30
# A step is halved after so many without gain.
_PATIENCE = 4


def overhead_bound(problem: Problem, budget_bytes: int, link: Link, plan: Solution) -> float:
    """Bound recompute time plus waiting of all plans with moves within a budget from below.

    Args:
        problem: the step.
        budget_bytes: the peak to stay within.
        link: what moves values.
        plan: a plan within the budget; the bound is sought below its overhead.
    """
    above_s = plan.overhead_s
    if above_s <= 0:
        return 0.0
    carried = _Carried(problem, link)
    held = held_at(problem, plan)
    best, prices = 0.0, np.zeros(len(held.fixed))
    at_best, stale, scale = prices, 0, 1.0
    for _ in range(_STEPS):
        value, excess = _value(held, prices, budget_bytes, carried)
        if value > best * (1 + 1e-6):
            best, at_best, stale = value, prices, 0
        else:
            stale += 1
        if stale >= _PATIENCE:
            scale, stale, prices = scale / 2, 0, at_best
            value, excess = _value(held, prices, budget_bytes, carried)
        slack = np.where((prices <= 0) & (excess < 0), 0.0, excess)
        size = float(slack @ slack)
        if not size or value >= above_s:
            break
        prices = np.maximum(0.0, prices + scale * (above_s - value) / size * slack)
    return float(min(best, above_s))


class _Carried:
    """What a link can carry in a step, and the waiting that more of it costs at the least."""

    def __init__(self, problem: Problem, link: Link) -> None:
        forward = problem.forward_ops
        backward = needed_by(problem.ops, problem.backward_outputs, forward)
        self._out, self._in = link.out_bytes_per_s, link.in_bytes_per_s
        self._forward_s = sum(problem.ops[i].time_s for i in forward)
        self._backward_s = sum(problem.ops[i].time_s for i in backward)
        forever = {*problem.held, *problem.output_storages, *problem.immovable}
        made = {s for i in forward for s in problem.ops[i].makes} - forever
        self.most_bytes = float(sum(problem.storage_bytes[s] for s in made))
        if link.host_bytes is not None:
            self.most_bytes = min(self.most_bytes, float(link.host_bytes))

    def least(self, value_s: float, price: float) -> tuple[float, float]:
        """The least overhead over all moved bytes, and how many they are.

        Args:
            value_s: bound on the recompute time where nothing moves.
            price: by how much it falls with each moved byte.
        """
        level = max(0.0, value_s + self._backward_s) / (price + 1 / self._in)
        gone = value_s / price if price > 0 else 0.0  # where the first part is down to 0
        tries = (0.0, self._forward_s * self._out, level, max(0.0, gone), self.most_bytes)
        return min((self._at(min(a, self.most_bytes), value_s, price), a) for a in tries)

    def _at(self, moved: float, value_s: float, price: float) -> float:
        out_s = max(0.0, moved / self._out - self._forward_s)
        back_s = moved / self._in - self._backward_s  # recompute time and waiting for copies in
        return out_s + max(value_s - price * moved, back_s, 0.0)


def _value(
    held: Held, prices: Floats, budget_bytes: int, carried: _Carried
) -> tuple[float, Floats]:
    """The bound at some prices, and its supergradient."""
    value, excess, _ = held.dual(prices, budget_bytes)
    bound, moved = carried.least(value, float(prices.sum()))
    return bound, excess - min(moved, carried.most_bytes)
