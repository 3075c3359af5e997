"""One plan for all ranks, made for the tightest of them; nobody waits without a limit.

Each rank records its own step. Where all steps are the same, the rank with the least budget makes
the plan, and all carry it out. Where they differ (uneven stages, experts), each makes its own: the
regions of an eager plan hold no collective, so that those of the step stay as they are; they are
compared, and have to come in the same order on all ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from ckpt_pass._errors import CkptPassError
from ckpt_pass.distributed.exchange import Exchange
from ckpt_pass.eager.planning import EagerStep, describe_step
from ckpt_pass.eager.step_record import EagerTrace
from ckpt_pass.eager.writing import step_words
from ckpt_pass.ops.taxonomy import OpClass, classify, op_name
from ckpt_pass.plans.budget import BudgetLike
from ckpt_pass.plans.goal import InFlight, as_goal, with_microbatches
from ckpt_pass.plans.value import Plan
from ckpt_pass.policy.named import as_policy
from ckpt_pass.version import __version__

#: A step is recorded, and its kernels measured, before a rank says anything.
TOGETHER_TIMEOUT_S = 120.0


class RanksDifferError(CkptPassError):
    """The ranks of a process group cannot carry out plans side by side."""


class RankFailedError(CkptPassError):
    """Another rank could not plan."""


def plan_together(
    model: nn.Module,
    *args: Any,
    budget: BudgetLike,
    loss_fn: Callable[[Any], Tensor] | None = None,
    in_flight: int | InFlight | None = None,
    gradients: str | None = None,
    cost: str = "roofline",
    name: str = "step",
    timeout_s: float = TOGETHER_TIMEOUT_S,
    kwargs: Mapping[str, Any] | None = None,
    **named: Any,
) -> Plan:
    """The eager plan of this rank, made together with all ranks of the default process group.

    Every rank calls it, with its own model, batch and budget. Ranks whose steps are the same get
    one plan, for the least of their budgets; otherwise each gets its own.

    Args:
        model, args, named, kwargs: this rank's model and batch (:func:`ckpt_pass.plan`).
        budget: this rank's budget; a fraction is of its own step.
        loss_fn, in_flight, gradients, cost: as of :func:`ckpt_pass.plan`.
        name: tells apart several plans of one program. Of calls with one name, the first of each
            rank belong together, then the second.
        timeout_s: how long to wait for what the other ranks say, in seconds.

    Raises:
        RankMissingError: a rank did not come in time.
        RankFailedError: another rank cannot plan; its error is in the message.
        RanksDifferError: the ranks have other versions of torch or of this library, or their steps
            have other collectives.
        NoProcessGroupError: ``torch.distributed`` is not initialised.
        InfeasibleBudgetError, and what else :func:`ckpt_pass.plan` raises: on this rank.
    """
    exchange = Exchange(f"ckpt_pass/together/{name}", "plan_together", timeout_s)
    goal = as_goal(budget, cost=cost)
    goal = with_microbatches(goal, in_flight, gradients)
    assert goal is not None
    inputs = {**named, **(kwargs or {})}
    with _Told(exchange, "step"):
        step = describe_step(model, args, as_policy("save-nothing"), goal, loss_fn, inputs)
        exchange.tell("step", _described(step))
    steps = _heard(exchange, exchange.ask_all("step"))
    _check_versions(steps)
    _check_collectives(steps)
    if len({told["step"] for told in steps}) > 1:
        with _Told(exchange, "plan"):
            plan = step.planned(step.budget_bytes)
            exchange.tell("plan", {})
    else:
        plan = _of_the_tightest(exchange, step, [told["budget_bytes"] for told in steps])
    _heard(exchange, exchange.ask_all("plan"))
    return plan


def _of_the_tightest(exchange: Exchange, step: EagerStep, budgets: list[int]) -> Plan:
    tightest = budgets.index(min(budgets))
    with _Told(exchange, "plan"):
        if exchange.rank == tightest:
            plan = step.planned(min(budgets))
            exchange.tell("plan", {"plan": plan.to_json()})
            return plan
        told = exchange.ask("plan", tightest)
        plan = Plan.from_json(_heard(exchange, [told], first=tightest)[0]["plan"])
        exchange.tell("plan", {})
        return plan


class _Told:
    """Tells the others what went wrong on this rank, so that they need not wait for it."""

    def __init__(self, exchange: Exchange, what: str) -> None:
        self._exchange = exchange
        self._what = what

    def __enter__(self) -> None:
        """Nothing yet."""

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is not None and not isinstance(error, RankFailedError):
            words = f"{type(error).__name__}: {error}"
            self._exchange.tell(self._what, {"failed": words})


def _heard(exchange: Exchange, told: list[dict[str, Any]], first: int = 0) -> list[dict[str, Any]]:
    for rank, one in enumerate(told, first):
        if "failed" in one and rank != exchange.rank:
            raise RankFailedError(
                f"Rank {rank} could not plan its step: {one['failed']} All ranks stop here. Give "
                "that rank a step and a budget that can be planned."
            )
    return told


def _described(step: EagerStep) -> dict[str, Any]:
    words = step_words(step.trace, str(step.goal.in_flight), step.goal.gradients)
    return {
        "step": hashlib.sha256(words.encode()).hexdigest(),
        "budget_bytes": step.budget_bytes,
        "torch": str(torch.__version__),
        "library": __version__,
        "collectives": _collectives(step.trace),
    }


def _collectives(trace: EagerTrace) -> list[str]:
    """The collectives of a step, in order; how much each exchanges may differ."""
    targets = (op.call.target for op in trace.ops)
    return [
        op_name(target)
        for target in targets
        if callable(target) and classify(target) is OpClass.COLLECTIVE
    ]


def _check_versions(steps: list[dict[str, Any]]) -> None:
    for key, words in (("torch", "torch"), ("library", "ckpt_pass")):
        for rank, told in enumerate(steps):
            if told[key] != steps[0][key]:
                raise RanksDifferError(
                    f"Rank {rank} has {words} {told[key]}, rank 0 has {steps[0][key]}. Expected "
                    "the same on all ranks, or their steps may differ. Install one version."
                )


def _check_collectives(steps: list[dict[str, Any]]) -> None:
    own = steps[0]["collectives"]
    for rank, told in enumerate(steps):
        for number, (one, other) in enumerate(zip_longest(own, told["collectives"])):
            if one != other:
                raise RanksDifferError(
                    f"The steps of rank 0 and rank {rank} have other collectives: number {number} "
                    f"is {one or 'none'} on rank 0, and {other or 'none'} on rank {rank}. "
                    "Expected the same ones in the same order, or the ranks would wait for each "
                    "other for ever. Give all ranks a model that is split in the same way."
                )
