"""Run a training job on copies, and measure its peak."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ckpt_pass._torch import compilers
from ckpt_pass.compile.backend import make_backend
from ckpt_pass.graph.capture import LossFn, whole_step
from ckpt_pass.job.copies import Copier
from ckpt_pass.job.jobs import Job
from ckpt_pass.measure.memory_profiler import MemoryProfiler
from ckpt_pass.plans.account import Account
from ckpt_pass.plans.step_plan import StepPlan
from ckpt_pass.plans.value import Plan
from ckpt_pass.state.untouched import untouched

#: Steps of the job: in the first one the optimizer makes its states.
STEPS = 3


def measured_job_peak(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    loss_fn: LossFn | None,
    plan: Plan | StepPlan,
    job: Job,
) -> int:
    """The peak of three steps of a job whose forward and backward are planned.

    It runs on copies of model and optimizers, which take their memory a second time; what stands
    there at the beginning is the account's.

    Args:
        model, args, kwargs, loss_fn: the step.
        plan: how it is carried out; it has an account.
        job: what happens around it.
    """
    account: Account | None = plan.account
    assert account is not None
    copied = Copier(_clone)
    model, loss_fn = copied(model), copied(loss_fn)
    job = _copy_of(job, copied)
    with contextlib.ExitStack() as stack:
        stack.enter_context(untouched(args, dict(kwargs), values=True))
        step: Callable[..., Any]
        if isinstance(plan, Plan) and plan.mode == "eager":
            stack.enter_context(plan.applied(model))
            step = whole_step(model, loss_fn)
        else:
            dynamic = bool(plan.dimensions) if isinstance(plan, Plan) else None
            whole = whole_step(model, loss_fn)
            step = compilers.compile_apart(whole, make_backend(plan=plan), dynamic)
            stack.enter_context(compilers.own_profile())
            with untouched(model, values=True):  # what compiling takes is not the job's
                step(*args, **kwargs).backward()
        with MemoryProfiler(torch.device(account.device)) as memory:
            for _ in range(STEPS):
                _run(lambda: step(*args, **kwargs), model, job)
    return account.before_bytes + memory.peak_bytes


def copies_for_updates(model: nn.Module, loss_fn: LossFn | None, job: Job) -> tuple[nn.Module, Job]:
    """A model and a job of its own for it, which may be stepped; the loss's parameters too."""
    copied = Copier(_clone)
    found = copied(model)
    copied(loss_fn)
    return found, _copy_of(job, copied)


def _copy_of(job: Job, copied: Copier) -> Job:
    return Job(
        copied(tuple(job.optimizers)),
        job.accumulate,
        job.set_to_none,
        job.clip_norm,
        copied(job.scaler),
    )


def _clone(tensor: torch.Tensor) -> torch.Tensor:
    found = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(found, tensor.requires_grad)
    return found


def _run(step: Callable[[], torch.Tensor], model: nn.Module, job: Job) -> None:
    """One step of a job."""
    scaler = job.scaler
    for _ in range(job.accumulate):
        loss = step()
        (loss if scaler is None else scaler.scale(loss)).backward()
    update(model, job)
    model.zero_grad(set_to_none=job.set_to_none)


def update(model: nn.Module, job: Job) -> None:
    """What a job does between a backward and letting go of the gradients."""
    scaler = job.scaler
    if job.clip_norm is not None:
        if scaler is not None:
            for optimizer in job.optimizers:
                scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.clip_norm)
    for optimizer in job.optimizers:
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
    if scaler is not None:
        scaler.update()
