"""What a plan is asked for: the budget, and how it is to be met."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from ckpt_pass._errors import CkptPassError, nearest
from ckpt_pass.offloading.options import InvalidOffloadError, Offload
from ckpt_pass.offloading.store import Store
from ckpt_pass.offloading.stores import OffloadLike
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
#: One of these, or a device on paper.
CostLike: TypeAlias = str | Device


class UnknownCostError(CkptPassError):
    """A cost model that there is not."""


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
    """

    budget: BudgetLike
    solver: Solver
    time_limit_s: float | None = None
    cost: CostLike = "roofline"
    offload: OffloadLike | None = None

    @property
    def is_plain_data(self) -> bool:
        """Whether its ``repr`` says all about it, on every run."""
        named = any(self.solver is solver for solver in SOLVERS.values())
        stays = self.offload is None  # a store of the user's, and a link that is measured, do not
        return named and self.time_limit_s is None and self.budget != "device" and stays

    def __str__(self) -> str:
        limit = "" if self.time_limit_s is None else f", {self.time_limit_s} s"
        moved = "" if self.offload is None else f", {self.offload}"
        return f"budget {self.budget}, solver {self.solver.name}, cost {self.cost}{limit}{moved}"


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


def as_offload(offload: OffloadLike | bool | None) -> OffloadLike | None:
    """Where values may be moved to; ``None`` for nowhere.

    Args:
        offload: ``True`` for the host, options, a store, ``False`` or ``None``.

    Raises:
        InvalidOffloadError: it is none of these.
    """
    if offload is None or offload is False:
        return None
    if offload is True:
        return Offload()
    if isinstance(offload, (Offload, Store)):
        return offload
    raise InvalidOffloadError(
        f"Got offload={offload!r}, expected True, False, Offload(to='host' or 'disk', ...), or a "
        "store."
    )
