"""What a total means: the memory of a whole training job, of which a step gets what is left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, Self, TypeAlias, TypeVar

import torch

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch import autograd
from ckpt_pass.amounts import parsed_bytes
from ckpt_pass.graph.paper import PaperKernels
from ckpt_pass.job.counting import Around, account_of
from ckpt_pass.job.jobs import Job, JobLike, as_job
from ckpt_pass.planner.device import Device
from ckpt_pass.planner.solution import InfeasibleBudgetError
from ckpt_pass.plans.account import Account
from ckpt_pass.plans.budget import DEVICE_RESERVE, BudgetLike, free_device_bytes
from ckpt_pass.plans.wording import format_bytes

#: ``"24GiB"``, bytes, or ``"device"``.
TotalLike: TypeAlias = str | int


class InvalidTotalError(CkptPassError):
    """A total that is no amount of memory, or that does not go with another argument."""


@dataclass(frozen=True)
class Cure:
    """A change that would make a job fit.

    Attributes:
        words: what is changed.
        needed_bytes: what the job needs then.
        is_device: whether it is another device, and the total that of it.
    """

    words: str
    needed_bytes: int
    is_device: bool = False

    def is_enough(self, total_bytes: int) -> bool:
        """Whether the job fits then."""
        return self.is_device or self.needed_bytes <= total_bytes

    def __str__(self) -> str:
        return f"{self.words} (needs {format_bytes(self.needed_bytes)})"


class InfeasibleTotalError(CkptPassError):
    """A training job does not fit the total that was asked for.

    Attributes:
        account: of the job, its forward and backward with the least peak that was found.
        total_bytes: what was asked for.
        needed_bytes: the least total that would do; planning with that number works.
        cures: what else would make it fit, each computed; where ``plan`` raises it.
        short: what was tried likewise, and is not enough.
    """

    def __init__(self, account: Account, total_bytes: int, tried: tuple[Cure, ...] = ()) -> None:
        self.account = account
        self.total_bytes = total_bytes
        self.needed_bytes = account.peak_bytes
        self.cures = tuple(cure for cure in tried if cure.is_enough(total_bytes))
        self.short = tuple(cure for cure in tried if not cure.is_enough(total_bytes))
        missing = self.needed_bytes - total_bytes
        where = account.peak_phase
        rows = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in account.rows())
        super().__init__(
            f"The job does not fit {total_bytes:,} bytes on {account.device} ({account.job}): it "
            f"needs {self.needed_bytes:,} at least, {missing:,} ({format_bytes(missing)}) are "
            f"missing. The peak is in the {where.name}, which adds "
            f"{format_bytes(where.above_bytes or 0)} to the {format_bytes(where.standing_bytes)} "
            f"that stand there ({rows}). " + _as_words(self.cures, self.short)
        )

    def with_tried(self, tried: tuple[Cure, ...]) -> InfeasibleTotalError:
        """The same, with changes that may make it fit."""
        return InfeasibleTotalError(self.account, self.total_bytes, tried)


def _as_words(cures: tuple[Cure, ...], short: tuple[Cure, ...]) -> str:
    if cures:
        return "What would make it fit: " + "; ".join(map(str, cures)) + "."
    words = "Give a larger total, smaller inputs, or an optimizer with less state."
    if not short:
        return words
    nearest = min(short, key=lambda cure: cure.needed_bytes)
    return f"Nothing that was tried is enough alone: {nearest} comes nearest. {words}"


class _Planned(Protocol):
    """A plan of a step."""

    @property
    def account(self) -> Account | None:
        """Of the job that it belongs to."""

    def with_account(self, account: Account) -> Self:
        """It as a part of a job."""


P = TypeVar("P", bound=_Planned)


@dataclass(frozen=True)
class JobAsked:
    """A job to plan for, and the memory that it may take.

    Attributes:
        job: what happens around a step.
        total: the memory of the whole job; ``None`` where there is a budget for the step, or none.
        device: the device on paper that it is planned for, if it is.
    """

    job: Job
    total: TotalLike | None
    device: Device | None = None

    def planned(self, around: Around, make: Callable[[int | None], P]) -> P:
        """A plan for a step of the job.

        Args:
            around: what stands around the step.
            make: plans the step within so many bytes; as it was asked for if ``None``.

        Raises:
            InfeasibleTotalError: no plan fits.
            ForeignOptimizerError, OptimizerFailedError: see
                :func:`ckpt_pass.job.counting.account_of`.
        """
        account = self.account(around)
        if account.total_bytes is None:
            return make(None).with_account(account)
        total_bytes, budget_bytes = account.total_bytes, step_budget_bytes(account)
        found = account
        for _ in range(2):  # what a step returns is known when it is planned
            try:
                made = make(budget_bytes).with_account(account)
            except InfeasibleBudgetError as error:  # planned again, to know that it works
                made = make(error.least_feasible_bytes).with_account(account)
            assert made.account is not None
            found = made.account
            if found.peak_bytes <= total_bytes:
                return made
            budget_bytes = max(total_bytes - found.pass_standing_bytes, 1)
            if all(p.peak_bytes <= total_bytes for p in found.phases if p.is_pass):
                break  # it is the optimizer's step
        raise InfeasibleTotalError(found, total_bytes)

    def account(self, around: Around) -> Account:
        """The account of the job, with its total, its forward and backward not planned yet.

        Raises:
            InvalidTotalError: the total is that of a device, and there is none.
            ForeignOptimizerError, OptimizerFailedError: see
                :func:`ckpt_pass.job.counting.account_of`.
        """
        paper = self.device
        if paper is None:
            found = account_of(around, self.job)
        else:
            where = torch.device("cuda:0" if paper.kind == "cuda" else "cpu")
            found = account_of(around, self.job, PaperKernels(paper), where)
            found = found.with_workspaces(paper.product_workspace_bytes)
            found = replace(found, device=f"{paper}, on paper")
        if self.total is None:
            return found
        if self.total == "device" and self.device is not None:
            return found.within(int(self.device.memory_bytes * (1 - DEVICE_RESERVE)))
        return found.within(resolve_total(self.total, around, self.job))


@contextlib.contextmanager
def told_of_total(account: Account) -> Iterator[None]:
    """Inside, a step that does not fit its budget is a job that does not fit its total.

    Raises:
        InfeasibleTotalError: it does not.
    """
    try:
        yield
    except InfeasibleBudgetError as error:
        if account.total_bytes is None:
            raise
        least = account.with_step(error.least_feasible_bytes, 0)
        raise InfeasibleTotalError(least, account.total_bytes) from None


def check_updates(account: Account) -> None:
    """Refuse a job whose parts beside forward and backward do not fit its total.

    Raises:
        InfeasibleTotalError: they do not.
    """
    highest = max((phase.peak_bytes for phase in account.updates), default=0)
    if account.total_bytes is not None and highest > account.total_bytes:
        raise InfeasibleTotalError(account, account.total_bytes)


def step_budget_bytes(account: Account) -> int:
    """What a total leaves for a forward and backward above what stands there: 1 at the least."""
    assert account.total_bytes is not None
    return max(account.total_bytes - account.pass_standing_bytes, 1)


def asked_job(
    total: TotalLike | None,
    optimizer: JobLike | None,
    budget: BudgetLike | None,
    device: Device | None = None,
) -> JobAsked | None:
    """The job that is asked for; ``None`` where no optimizer is given.

    A budget of ``"device"`` is a total where there is an optimizer: what it has yet to allocate is
    not free.

    Raises:
        InvalidTotalError: a total without an optimizer, beside a budget, or no amount of memory.
        InvalidJobError: the optimizer is none.
    """
    if total is None and optimizer is None:
        return None
    if optimizer is None:
        raise InvalidTotalError(
            f"Got total={total!r} without an optimizer, expected one: optimizer=..., whose states "
            "the total has to hold. For forward and backward alone give budget=."
        )
    job = as_job(optimizer)
    if total is None:
        return JobAsked(job, "device" if budget == "device" else None, device)
    if budget is not None:
        raise InvalidTotalError(
            f"Got total={total!r} and budget={budget!r}, expected one of the two: a total is for "
            "the whole job, and says what the step may take. Leave budget out."
        )
    return JobAsked(job, check_total(total), device)


def check_total(total: TotalLike) -> TotalLike:
    """Return a total if it can mean something.

    Raises:
        InvalidTotalError: it is no amount of memory.
    """
    if total != "device":
        _bytes_of(total)
    return total


def _bytes_of(total: TotalLike) -> int:
    nbytes = parsed_bytes(total) if isinstance(total, str) else total
    if isinstance(nbytes, bool) or not isinstance(nbytes, int) or nbytes <= 0:
        raise InvalidTotalError(
            f"Got total={total!r}, expected an amount such as '24GiB' or '500 MB', a positive "
            "number of bytes, or 'device'."
        )
    return nbytes


def resolve_total(total: TotalLike, around: Around, job: Job) -> int:
    """A total in bytes; of ``"device"`` what is free, less a reserve, with what is the job's own.

    Raises:
        InvalidTotalError: it is no amount of memory, or there is no accelerator to ask.
    """
    if total != "device":
        return _bytes_of(total)
    free = free_device_bytes()
    if free is None:
        raise InvalidTotalError(
            f"Got {total!r} as an amount of memory: there is no accelerator here. Expected one, or "
            "an amount such as total='24GiB'."
        )
    return int(free * (1 - DEVICE_RESERVE)) + _own_bytes(around, job)


def _own_bytes(around: Around, job: Job) -> int:
    """What of the job is on an accelerator already."""
    states = (value for one in job.optimizers for value in _tensors(list(one.state.values())))
    gradients = (t.grad for t in around.parameters if t.is_leaf and t.grad is not None)
    found = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in (*around.tensors, *states, *gradients)
        if tensor.layout is torch.strided and not _is_elsewhere(tensor)
    }
    return sum(found.values())


def _is_elsewhere(tensor: torch.Tensor) -> bool:
    return tensor.device.type in ("cpu", "meta") or autograd.is_fake(tensor)


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in _tensors(item)] if isinstance(value, list) else []
