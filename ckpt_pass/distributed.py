"""Plans on several ranks: make sure, before the first step, that all carry out the same one.

Ranks that recompute differently run their collectives in different orders, and hang. So they
compare fingerprints first, through the process group's own store, which can be waited for with a
time limit; a collective could not.
"""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch import functorch
from ckpt_pass.plans.differences import plan_differences
from ckpt_pass.plans.value import Plan

DEFAULT_TIMEOUT_S = 5.0
_PREFIX = "ckpt_pass/plan"


class PlansDivergeError(CkptPassError):
    """The ranks of a process group have different plans."""


class RankMissingError(CkptPassError):
    """A rank did not come to compare its plan in time."""


class NoProcessGroupError(CkptPassError):
    """There is no process group to compare plans in."""


def agree(plan: Plan, *, name: str = "step", timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
    """Raise on every rank unless all ranks of the default process group have the same plan.

    Every rank calls it, before its first step. Nothing is sent to a device; it works with any
    backend, and never waits longer than the limit.

    Args:
        plan: this rank's plan.
        name: tells apart several plans of one program, such as of two models; a name is used once.
        timeout_s: how long to wait for the other ranks, in seconds.

    Raises:
        PlansDivergeError: with both fingerprints and the first differing decision.
        RankMissingError: a rank did not come in time.
        NoProcessGroupError: ``torch.distributed`` is not initialised.
    """
    if not dist.is_initialized():
        raise NoProcessGroupError(
            "agree() compares the plans of a process group, but torch.distributed is not "
            "initialised. Call init_process_group first, or leave agree() out on one process."
        )
    store = dist.PrefixStore(f"{_PREFIX}/{name}", functorch.default_store())
    rank, size = dist.get_rank(), dist.get_world_size()
    store.set(f"{rank}", json.dumps({"fingerprint": _what(plan), "plan": plan.to_json()}))
    theirs = {other: _read(store, other, timeout_s) for other in range(size)}
    different = [other for other in range(size) if theirs[other]["fingerprint"] != _what(plan)]
    if not different:
        return
    other = different[0]
    found = plan_differences(plan, Plan.from_json(theirs[other]["plan"]))
    raise PlansDivergeError(
        f"The plans of the ranks differ: rank {rank} has {_what(plan)}, rank {other} has "
        f"{theirs[other]['fingerprint']}. First differences, rank {rank} being one and rank "
        f"{other} the other: {'; '.join(found[:3]) or 'none in the decisions'}. Give every rank "
        "the same model, shapes and budget, or load one plan file on all of them."
    )


def _what(plan: Plan) -> str:
    return plan.fingerprint


def _read(store: Any, rank: int, timeout_s: float) -> dict[str, str]:
    try:
        store.wait([f"{rank}"], timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError) as error:  # DistStoreError, or as other stores say it
        raise RankMissingError(
            f"Rank {rank} did not bring its plan within {timeout_s:g} s. Expected agree() on every "
            "rank before the first step: look whether that rank failed, or does not call it."
        ) from error
    found: dict[str, str] = json.loads(store.get(f"{rank}"))
    return found
