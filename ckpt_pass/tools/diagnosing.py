"""Whether a training job fits an amount of memory, and what would make it fit."""

from __future__ import annotations

from typing import Any

from torch import nn

from ckpt_pass.job.jobs import JobLike
from ckpt_pass.job.totals import InfeasibleTotalError, TotalLike
from ckpt_pass.planner.devices import DeviceLike, as_device
from ckpt_pass.report.diagnoses import Diagnosis
from ckpt_pass.tools.ahead import plan


def doctor(
    model: nn.Module,
    *args: Any,
    optimizer: JobLike,
    total: TotalLike = "device",
    device: DeviceLike | None = None,
    **options: Any,
) -> Diagnosis:
    """Say what a training job takes, whether it fits, and if not, what would make it fit.

    The step is planned for the total as :func:`ckpt_pass.plan` does; nothing is run or changed.

    Args:
        model: the module.
        args: its arguments.
        optimizer: what steps: an optimizer, several, or a :class:`ckpt_pass.Job` that says more.
        total: the memory of the whole job: ``"24GiB"``, bytes, or ``"device"``: what the device
            has.
        device: a device that is not here, for a plan on paper.
        options: as for :func:`ckpt_pass.plan`, and the model's named arguments.

    Returns:
        The account of the job with the plan where it fits, and with cures where it does not.

    Raises:
        CkptPassError: as :func:`ckpt_pass.plan`, but where the job does not fit.
    """
    paper = None if device is None else as_device(device)
    try:
        found = plan(model, *args, total=total, optimizer=optimizer, device=paper, **options)
    except InfeasibleTotalError as error:
        return Diagnosis(
            error.account.within(error.total_bytes), None, error.cures, error.short, paper
        )
    assert found.account is not None, "there is a total"
    return Diagnosis(found.account, found, device=paper)
