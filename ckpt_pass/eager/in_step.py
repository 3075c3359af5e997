"""One solution for all ranks that share out the values of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from ckpt_pass.offloading.sharding import Sharding
from ckpt_pass.planner.eager_solve import EagerSolution
from ckpt_pass.planner.solution import InfeasibleBudgetError


def in_step(
    sharding: Sharding, budget_bytes: int, solved: Callable[[int], EagerSolution]
) -> EagerSolution:
    """The first rank's solution for the least budget of all ranks, on each of them.

    Args:
        sharding: over which ranks.
        budget_bytes: this rank's.
        solved: finds a solution for a budget.

    Raises:
        ShardGroupError: the group is not there.
        InfeasibleBudgetError: there is none; on all ranks.
    """
    group = sharding.found_group()
    budgets: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(budgets, budget_bytes, group=group)
    found: list[Any] = [None]
    if dist.get_rank(group) == 0:
        try:
            found[0] = solved(min(budgets))
        except InfeasibleBudgetError as error:
            found[0] = error.least_feasible_bytes
    dist.broadcast_object_list(found, src=dist.get_global_rank(group, 0), group=group)
    if not isinstance(found[0], EagerSolution):
        raise InfeasibleBudgetError(budget_bytes, found[0])
    return found[0]
