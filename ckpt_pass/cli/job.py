"""What the commands share that are told of a whole job."""

from __future__ import annotations

from typing import Any

from torch import nn

from ckpt_pass.job.jobs import Job
from ckpt_pass.job.named import optimizer_class, optimizer_named
from ckpt_pass.job.totals import check_total
from ckpt_pass.planner.devices import as_device
from ckpt_pass.plans.budget import parse_budget

#: What steps where none is named.
DEFAULT_OPTIMIZER = "AdamW"


def total_option() -> Any:
    """``--total``."""
    import typer

    return typer.Option(None, help="Memory of the whole training job, instead: 24GiB, or bytes.")


def optimizer_option() -> Any:
    """``--optimizer``."""
    import typer

    return typer.Option(
        None, help="What steps: AdamW, 'SGD(momentum=0.9)' or another class of torch.optim."
    )


def accumulate_option() -> Any:
    """``--accumulate``."""
    import typer

    return typer.Option(1, min=1, help="Microbatches of an optimizer's step.")


def check_job(total: str | None, optimizer: str | None, device: str | None = None) -> None:
    """Say what is misspelt before the model is built.

    Raises:
        InvalidTotalError, UnknownOptimizerError, UnknownDeviceError: something is.
    """
    if total is not None:
        check_total(_amount(total))
    if optimizer is not None:
        optimizer_class(optimizer)
    if device is not None:
        as_device(device)


def job_options(
    model: nn.Module, total: str | None, optimizer: str | None, accumulate: int
) -> dict[str, Any]:
    """The options of a whole job; without a name the optimizer is AdamW."""
    if total is None and optimizer is None:
        return {}
    stepped = optimizer_named(optimizer or DEFAULT_OPTIMIZER, model)
    amount = None if total is None else _amount(total)
    return {"total": amount, "optimizer": Job(stepped, accumulate)}


def _amount(total: str) -> Any:
    return parse_budget(total)
