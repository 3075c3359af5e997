"""How many microbatches a stage of a pipeline has in flight, read from the schedule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ckpt_pass._errors import CkptPassError
from ckpt_pass.plans.goal import InFlight

_FORWARD, _BACKWARD, _OF_WEIGHTS = "F", "B", "W"


class ScheduleError(CkptPassError):
    """A schedule that does not say what a stage runs when, or that runs its backward in parts."""


def in_flight_of(schedule: Any, stage_index: int | None = None) -> InFlight:
    """The most microbatches that have run forward and not yet backward, in one stage.

    For ``plan(stage_module, ..., in_flight=...)``, and any schedule of
    ``torch.distributed.pipelining`` that has an order of its actions: GPipe has all microbatches in
    flight, and one less once there are gradients; 1F1B as many as there are stages from this one
    on, and as many later.

    Args:
        schedule: the schedule, as it is made on this rank.
        stage_index: the stage; this rank's own where it has one alone.

    Raises:
        ScheduleError: it has no order, no such stage, or several of its own; or the backward of
            weights is apart from that of inputs, as in zero-bubble schedules.
    """
    order = getattr(schedule, "pipeline_order", None)
    kind = type(schedule).__name__
    if not order:
        raise ScheduleError(
            f"Got a {kind} as the schedule of a pipeline, expected one of "
            "torch.distributed.pipelining with an order of its actions (ScheduleGPipe, "
            "Schedule1F1B, ...). Give in_flight= the number itself."
        )
    stages = {action.stage_index for actions in order.values() for action in _parts(actions)}
    wanted = _own_stage(schedule, kind) if stage_index is None else stage_index
    if wanted not in stages:
        raise ScheduleError(
            f"Got stage_index={wanted} of a {kind} with the stages {sorted(stages)}, expected one "
            "of them."
        )
    first = later = now = 0
    ended = False
    for actions in order.values():
        for action in _parts(actions):
            if action.stage_index == wanted:
                what = action.computation_type.value
                if what == _OF_WEIGHTS:
                    raise ScheduleError(
                        f"Got a {kind}, which runs the backward of weights apart from that of "
                        "inputs: what a region keeps it hands out once, and no plan knows what "
                        "waits between the two. Expected a schedule with one backward a "
                        "microbatch (ScheduleInterleaved1F1B), or a placement in place of a plan "
                        "(ckpt_pass.apply(stage, 'all'))."
                    )
                now += (what == _FORWARD) - (what == _BACKWARD)
                ended = ended or what == _BACKWARD
                first, later = max(first, now * (not ended)), max(later, now * ended)
    return InFlight(first, later)


def _parts(actions: Any) -> Iterator[Any]:
    """The actions of one rank, those that overlap one after the other."""
    for action in actions:
        if action is not None:
            inside = getattr(action, "sub_actions", None)
            yield from _parts(inside) if inside else (action,)


def _own_stage(schedule: Any, kind: str) -> int:
    own = getattr(schedule, "_stages", None) or [getattr(schedule, "_stage", None)]
    if len(own) != 1 or own[0] is None:
        raise ScheduleError(
            f"This rank has {len(own)} stages of a {kind}, expected stage_index= to say which."
        )
    return int(own[0].stage_index)
