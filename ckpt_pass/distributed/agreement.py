"""Make sure, before the first step, that all ranks carry out the same plan.

Ranks that recompute differently run their collectives in different orders, and hang. So they
compare fingerprints first, through the process group's own store, which can be waited for with a
time limit; a collective could not.
"""

from __future__ import annotations

from ckpt_pass._errors import CkptPassError
from ckpt_pass.distributed.exchange import Exchange
from ckpt_pass.distributed.exchange import NoProcessGroupError as NoProcessGroupError
from ckpt_pass.distributed.exchange import RankMissingError as RankMissingError
from ckpt_pass.plans.differences import plan_differences
from ckpt_pass.plans.value import Plan

DEFAULT_TIMEOUT_S = 5.0


class PlansDivergeError(CkptPassError):
    """The ranks of a process group have different plans."""


def agree(plan: Plan, *, name: str = "step", timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
    """Raise on every rank unless all ranks of the default process group have the same plan.

    Every rank calls it, before its first step. Nothing is sent to a device; it works with any
    backend, and never waits longer than the limit.

    Args:
        plan: this rank's plan.
        name: tells apart several plans of one program, such as of two models. Of calls with
            one name, the first of each rank belong together, then the second.
        timeout_s: how long to wait for the other ranks, in seconds.

    Raises:
        PlansDivergeError: with both fingerprints and the first differing decision.
        RankMissingError: a rank did not come in time.
        NoProcessGroupError: ``torch.distributed`` is not initialised.
    """
    exchange = Exchange(f"ckpt_pass/plan/{name}", "agree", timeout_s)
    exchange.tell("plan", {"fingerprint": plan.fingerprint, "plan": plan.to_json()})
    theirs = exchange.ask_all("plan")
    different = [n for n, told in enumerate(theirs) if told["fingerprint"] != plan.fingerprint]
    if not different:
        return
    rank, other = exchange.rank, different[0]
    found = plan_differences(plan, Plan.from_json(theirs[other]["plan"]))
    raise PlansDivergeError(
        f"The plans of the ranks differ: rank {rank} has {plan.fingerprint}, rank {other} has "
        f"{theirs[other]['fingerprint']}. First differences, rank {rank} being one and rank "
        f"{other} the other: {'; '.join(found[:3]) or 'none in the decisions'}. Give every rank "
        "the same model, shapes and budget, or load one plan file on all of them."
    )
