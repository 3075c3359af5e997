"""Time planned forwards and backwards, and an optimizer's step, on real tensors."""

from __future__ import annotations

import contextlib
import gc
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ckpt_pass._torch import autograd, compilers
from ckpt_pass._torch.storages import has_memory
from ckpt_pass.compile.backend import make_backend
from ckpt_pass.graph.capture import LossFn, whole_step
from ckpt_pass.job.jobs import Job
from ckpt_pass.measure.gradients import NoLossError, gradients_restored, is_loss
from ckpt_pass.measure.timing import clock_for, resting_collector
from ckpt_pass.plans.account import Account
from ckpt_pass.plans.budget import free_device_bytes
from ckpt_pass.plans.step_plan import StepPlan
from ckpt_pass.plans.value import Plan
from ckpt_pass.state.holders import Reached
from ckpt_pass.state.untouched import holders_restored, untouched
from ckpt_pass.tools.candidates import Arguments, Batches, Planned
from ckpt_pass.tools.job_run import copies_for_updates, update


def is_real(*roots: Any) -> bool:
    """Whether every tensor that is reached has values."""
    return all(
        tensor.device.type != "meta" and not autograd.is_fake(tensor) and has_memory(tensor)
        for tensor in Reached(roots).tensors
    )


class Stopwatch:
    """Times steps of a model, which is left as it was; to be used in :meth:`opened`.

    Args:
        model, loss_fn: the step.
        batches: its arguments.
        rounds: timings of each; their median counts.
    """

    def __init__(
        self, model: nn.Module, loss_fn: LossFn | None, batches: Batches, rounds: int
    ) -> None:
        self._model, self._loss_fn = model, loss_fn
        self._batches, self._rounds = batches, rounds
        found = Reached((model, loss_fn)).tensors
        self._leaves = [t for t in found if t.is_leaf and t.requires_grad]
        self._device = self._leaves[0].device if self._leaves else torch.device("cpu")
        self._clock = clock_for(self._device)
        self._seconds: dict[Planned, list[float]] = {}
        self._steps: dict[Planned, _Step] = {}

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Keep what steps change: buffers, gradients, attributes, random states."""
        with (
            untouched(self._model, self._loss_fn, values=True),
            gradients_restored(self._leaves),
            compilers.own_profile(),
        ):
            for leaf in self._leaves:
                leaf.grad = None
            yield

    def pass_s(self, candidate: Planned) -> float | None:
        """Seconds of a candidate's forward and backward; ``None`` where memory does not suffice.

        Gradients are new, or there already, as they are in the candidate's job.

        Raises:
            NoLossError: the step returns no scalar.
        """
        step = self._steps.setdefault(candidate, self._step(candidate))
        known = self._seconds.setdefault(candidate, [])
        try:
            with self._with_arguments(candidate) as made, resting_collector():
                # The first run compiles; where gradients are added up, the first one makes them.
                for _ in range(2):
                    self._timed(candidate, step, made)
                known += [self._timed(candidate, step, made) for _ in range(self._rounds)]
        except torch.OutOfMemoryError:
            self._clear()
            return None
        return statistics.median(known)

    def forget(self, candidates: Iterable[Planned]) -> None:
        """Let go of what candidates took, for times in turn alone."""
        for one in candidates:
            self._seconds[one] = []

    def in_turn(self, candidates: Iterable[Planned]) -> dict[Planned, float]:
        """The medians of candidates that ran before, once they were timed again, in turn."""
        several = list(candidates)
        with resting_collector():
            for _ in range(self._rounds):
                for one in several:
                    with self._with_arguments(one) as made:
                        if one.keeps_gradients:
                            self._timed(one, self._steps[one], made)  # makes the gradients
                        self._seconds[one].append(self._timed(one, self._steps[one], made))
        return {one: statistics.median(self._seconds[one]) for one in several}

    def _step(self, candidate: Planned) -> _Step:
        whole = whole_step(self._model, self._loss_fn)
        plan = candidate.plan
        if isinstance(plan, Plan) and plan.mode == "eager":
            return _Step(whole, partial(plan.applied, self._model))
        assert isinstance(plan, (Plan, StepPlan))
        # Of a step that dynamo cuts, what it finds between the graphs may differ from run to run.
        dynamic = False if isinstance(plan, Plan) else None
        return _Step(compilers.compile_apart(whole, make_backend(plan=plan), dynamic))

    @contextlib.contextmanager
    def _with_arguments(self, candidate: Planned) -> Iterator[Arguments]:
        args, kwargs = self._batches.at(candidate.microbatch)
        leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        leaves = [t for t in leaves if t.is_leaf and t.requires_grad]
        with untouched(args, kwargs, values=True), gradients_restored(leaves):
            yield args, kwargs

    def _timed(self, candidate: Planned, step: _Step, made: Arguments) -> float:
        args, kwargs = made
        if not candidate.keeps_gradients:
            self._clear()
        with step.around(), holders_restored(self._model, self._loss_fn, args, kwargs):
            gc.collect()
            self._synchronise()
            start = self._clock()
            loss = step.run(*args, **kwargs)
            if not isinstance(loss, torch.Tensor) or not is_loss(loss):
                raise NoLossError(loss)
            loss.backward()
            self._synchronise()
            return self._clock() - start

    def update_s(self, job: Job, account: Account) -> float | None:
        """Seconds of an optimizer's step, on copies of it and of the model.

        ``None`` where they do not fit beside these.
        """
        free = free_device_bytes() if self._device.type == "cuda" else None
        beside = account.parameters_bytes + account.buffers_bytes + account.gradients_bytes
        adds = max((phase.above_bytes or 0 for phase in account.updates), default=0)
        if free is not None and free < beside + account.states_bytes + adds:
            return None
        with untouched(*(vars(one) for one in job.optimizers)), resting_collector():
            model, own = copies_for_updates(self._model, self._loss_fn, job)
            self._updated(model, own)  # makes the states
            return statistics.median(self._updated(model, own) for _ in range(self._rounds))

    def _updated(self, model: nn.Module, job: Job) -> float:
        groups = [group for one in job.optimizers for group in one.param_groups]
        for parameter in (p for group in groups for p in group["params"]):
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        if job.scaler is not None:
            job.scaler.scale(torch.ones((), device=self._device))
        self._synchronise()
        start = self._clock()
        update(model, job)
        self._synchronise()
        return self._clock() - start

    def _clear(self) -> None:
        for leaf in self._leaves:
            leaf.grad = None

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


@dataclass(frozen=True)
class _Step:
    """A planned step; ``around`` is in place whenever it runs."""

    run: Callable[..., Any]
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
