"""What a plan is asked for: the budget, and how it is to be met."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

from ckpt_pass._errors import CkptPassError, nearest
from ckpt_pass.offloading.options import InvalidOffloadError
from ckpt_pass.offloading.sharding import InvalidShardingError, Sharding
from ckpt_pass.offloading.stores import OffloadLike, as_offload
from ckpt_pass.planner.device import Device, InvalidDeviceError
from ckpt_pass.planner.devices import DeviceLike, as_device
from ckpt_pass.planner.solvers import (
    DEFAULT_SOLVER,
    SOLVERS,
    Solver,
    SolverLike,
    as_solver,
    checked_time_limit,
)
from ckpt_pass.plans.budget import BudgetLike, check_budget

COSTS = ("roofline", "measured")
#: Whose gradients a step finds: nobody's; an earlier step's, which were there before; those of an
#: earlier microbatch of its own, which count.
GRADIENTS = ("new", "kept", "accumulated")
#: One of these, or a device on paper.
CostLike: TypeAlias = str | Device


class UnknownCostError(CkptPassError):
    """A cost model that there is not."""


class MicrobatchesError(CkptPassError):
    """Microbatches in flight, or gradients, that a step cannot have."""


@dataclass(frozen=True)
class InFlight:
    """How many microbatches of a pipeline's stage have run forward and not yet backward.

    Attributes:
        first: the most before a backward has ended, when there are no gradients yet.
        later: the most afterwards.
    """

    first: int
    later: int

    def __str__(self) -> str:
        later = "" if self.later == self.first else f", {self.later} once there are gradients"
        return f"{self.first} microbatches in flight{later}"


@dataclass(frozen=True)
class Goal:
    """A budget and how it is to be met; made by :func:`as_goal`.

    Attributes:
        budget: the peak to stay within.
        solver: what looks for the plan.
        time_limit_s: seconds for the solver, if any.
        cost: ``roofline`` (modelled times), ``measured`` (each kernel is run and timed once), or a
            device on paper, whose rates count and whose kernels are not run.
        offload: where values may be moved to, if they may.
        in_flight: how many microbatches a stage of a pipeline has in flight; ``None`` where the
            step is no such stage.
        gradients: one of ``GRADIENTS``.
        shard_over: over which ranks what regions keep may be sharded, if it may.
    """

    budget: BudgetLike
    solver: Solver
    time_limit_s: float | None = None
    cost: CostLike = "roofline"
    offload: OffloadLike | None = None
    in_flight: InFlight | None = None
    gradients: str = "new"
    shard_over: Sharding | None = None

    @property
    def is_plain_data(self) -> bool:
        """Whether its ``repr`` says all about it, on every run."""
        named = any(self.solver is solver for solver in SOLVERS.values())
        # A store of the user's, and a link that is measured, do not.
        stays = self.offload is None and self.shard_over is None
        return named and self.time_limit_s is None and self.budget != "device" and stays

    def __str__(self) -> str:
        limit = "" if self.time_limit_s is None else f", {self.time_limit_s} s"
        moved = "" if self.offload is None else f", {self.offload}"
        many = "" if self.in_flight is None else f", {self.in_flight}"
        grads = "" if self.gradients == "new" else f", gradients {self.gradients}"
        shared = "" if self.shard_over is None else ", shard over ranks"
        asked = f"budget {self.budget}, solver {self.solver.name}, cost {self.cost}"
        return f"{asked}{limit}{moved}{shared}{many}{grads}"


def as_goal(
    budget: BudgetLike | None,
    solver: SolverLike = DEFAULT_SOLVER,
    time_limit_s: float | None = None,
    cost: CostLike = "roofline",
    offload: OffloadLike | bool | None = None,
) -> Goal | None:
    """Check what a user asks for; ``None`` without a budget.

    Raises:
        InvalidBudgetError, UnknownSolverError, InvalidTimeLimitError, UnknownCostError,
            InvalidOffloadError: an argument is not one of these; checked without a budget too.
    """
    where = as_offload(offload)
    chosen, limit = as_solver(solver), checked_time_limit(time_limit_s)
    if not isinstance(cost, Device) and cost not in COSTS:
        raise UnknownCostError(
            f"Got cost={cost!r}, expected one of {', '.join(COSTS)}.{nearest(str(cost), COSTS)}"
        )
    return None if budget is None else Goal(check_budget(budget), chosen, limit, cost, where)


def with_microbatches(
    goal: Goal | None, in_flight: int | InFlight | None, gradients: str | None
) -> Goal | None:
    """The goal of a step that is one of several microbatches.

    Args:
        goal: the goal of one alone; ``None`` without a budget.
        in_flight: how many have run forward and not yet backward, at the most.
        gradients: one of ``GRADIENTS``; where ``None``, ``accumulated`` for a stage of a pipeline,
            and ``new`` for other steps.

    Raises:
        MicrobatchesError: there are none such, or they do not go with what else is asked.
    """
    many = _as_in_flight(in_flight)
    if gradients is not None and gradients not in GRADIENTS:
        raise MicrobatchesError(
            f"Got gradients={gradients!r}, expected one of {', '.join(GRADIENTS)}."
            f"{nearest(str(gradients), GRADIENTS)}"
        )
    found = gradients or ("new" if many is None else "accumulated")
    if goal is None:
        if many is not None or found != "new":
            raise MicrobatchesError(
                f"Got in_flight={in_flight} and gradients={found!r} without a budget, expected "
                "one: they say what lies in memory besides a microbatch. Give budget=."
            )
        return None
    if many is not None and goal.offload is not None:
        raise MicrobatchesError(
            f"Got in_flight={in_flight} with offload={goal.offload!r}, which is not supported: "
            "copies of several microbatches share the link. Leave one of the two out."
        )
    return replace(goal, in_flight=many, gradients=found)


def with_sharding(goal: Goal | None, sharding: Sharding | None) -> Goal | None:
    """The goal of a step whose regions may share out what they keep.

    Raises:
        InvalidShardingError: there is no budget, or values may be offloaded as well.
    """
    if sharding is None:
        return goal
    if goal is None or goal.offload is not None:
        got, how = ("no budget", "one") if goal is None else (str(goal.offload), "one of the two")
        raise InvalidShardingError(
            f"Got shard_over= with {got}, expected {how}: it is an eager plan within a budget that "
            "chooses what is sharded, and a plan that also offloads is not there. Give budget=, "
            "and leave offload= out."
        )
    return replace(goal, shard_over=sharding)


def _as_in_flight(in_flight: int | InFlight | None) -> InFlight | None:
    if in_flight is None or isinstance(in_flight, InFlight):
        return in_flight
    if not isinstance(in_flight, int) or isinstance(in_flight, bool) or in_flight < 1:
        raise MicrobatchesError(
            f"Got in_flight={in_flight!r}, expected how many microbatches have run forward and not "
            "yet backward at the most, 1 or more, or what a schedule says: "
            "ckpt_pass.distributed.in_flight_of(schedule)."
        )
    return InFlight(in_flight, in_flight)


def cost_on(cost: CostLike, device: DeviceLike | None) -> CostLike:
    """The cost model that is meant: that of a device on paper, where one is named.

    Raises:
        UnknownDeviceError: there is no such device.
        InvalidDeviceError: it is none, or kernels are to be timed as well.
    """
    if device is None:
        return cost
    found = as_device(device)
    if cost == "measured":
        raise InvalidDeviceError(
            f"Got device={found.name!r} together with cost='measured', expected one of the two: "
            "kernels of a device on paper cannot be timed here. Leave cost out, or leave device "
            "out and plan where the device is."
        )
    return found


def check_offload(offload: object, budget: object, policy: object) -> None:
    """Refuse a place for values where nothing says what goes there.

    Raises:
        InvalidOffloadError: there is neither a budget nor a policy.
    """
    if offload and budget is None and policy is None:
        raise InvalidOffloadError(
            f"Got offload={offload!r} without a budget or a policy, expected one of them: what is "
            "moved is chosen so that the step keeps to a budget, or is named by a policy "
            "(ckpt_pass.offload(...)). Give budget=, or policy=."
        )
