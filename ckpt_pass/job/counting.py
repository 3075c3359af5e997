"""Count what stands around a step: the optimizer of the user's own, stepped on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch import ahead, autograd, optimizers, wrappers
from ckpt_pass.graph.kernels import Kernels
from ckpt_pass.graph.link import device_of
from ckpt_pass.job.buckets import buckets_of
from ckpt_pass.job.copies import Copier
from ckpt_pass.job.follower import Follower
from ckpt_pass.job.gradients import without_gradient
from ckpt_pass.job.jobs import Job
from ckpt_pass.plans.account import (
    CLIPPING,
    FIRST_PASS,
    FIRST_UPDATE,
    PASS,
    PHASES,
    UNSCALING,
    UPDATE,
    Account,
    JobPhase,
)
from ckpt_pass.state.holders import Reached
from ckpt_pass.state.untouched import untouched

#: Steps that an optimizer is looked at: what it makes at its first and second step stays.
STEPS = 3
_EXPECTED_OPTIMIZER = (
    "Expected the optimizer that steps this model: made with model.parameters(), after the model "
    "was moved or converted."
)


class ForeignOptimizerError(CkptPassError):
    """An optimizer steps parameters that are not the model's."""


class OptimizerFailedError(CkptPassError):
    """An optimizer cannot be stepped on fake tensors."""


@dataclass(frozen=True)
class Around:
    """The tensors around a step.

    Attributes:
        parameters: all parameters, of the model and of its loss.
        buffers: other tensors that they hold.
        inputs: those of one batch.
        trained: those of the parameters that get gradients.
        buckets: parameters whose gradients have a place that is there before the first step, and
            whether they lie in it (:mod:`ckpt_pass.job.buckets`).
    """

    parameters: tuple[torch.Tensor, ...]
    buffers: tuple[torch.Tensor, ...]
    inputs: tuple[torch.Tensor, ...]
    trained: tuple[torch.Tensor, ...]
    buckets: tuple[tuple[torch.Tensor, bool], ...] = ()

    @classmethod
    def of_step(
        cls,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        loss_fn: Callable[..., Any] | None = None,
    ) -> Around:
        """What a step of ``loss_fn(model(*args, **kwargs))`` has around it.

        Raises:
            UninitializedParameterError: a parameter has no shape yet.
        """
        given = {id(t): t for t in Reached((args, dict(kwargs))).tensors}
        held = [t for t in Reached((model, loss_fn)).tensors if id(t) not in given]
        parameters = tuple(t for t in held if isinstance(t, nn.Parameter))
        buffers = tuple(t for t in held if not isinstance(t, nn.Parameter))
        unused = without_gradient(model, args, kwargs, loss_fn)
        trained = tuple(t for t in parameters if t.requires_grad and id(t) not in unused)
        return cls(parameters, buffers, tuple(given.values()), trained, buckets_of(model))

    @classmethod
    def of_graph(cls, inputs: Iterable[Any], job: Job) -> Around:
        """What the step of a graph has around it: what it takes, and what the optimizer steps.

        Raises:
            ForeignOptimizerError: the optimizer steps nothing of the graph's.
        """
        given = {id(value): value for value in inputs if isinstance(value, torch.Tensor)}
        stepped = {
            id(p): p for one in job.optimizers for g in one.param_groups for p in g["params"]
        }
        if given and not stepped.keys() & given.keys():
            raise ForeignOptimizerError(
                f"None of the {len(given)} tensors that the graph takes is a parameter of "
                f"{job}. {_EXPECTED_OPTIMIZER}"
            )
        held = stepped | {key: t for key, t in given.items() if isinstance(t, nn.Parameter)}
        others = tuple(t for key, t in given.items() if key not in held)
        parameters = tuple(held.values())
        return cls(parameters, (), others, tuple(t for t in parameters if t.requires_grad))

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All of them."""
        return (*self.parameters, *self.buffers, *self.inputs)


def account_of(
    around: Around,
    job: Job,
    kernels: Kernels | None = None,
    device: torch.device | None = None,
) -> Account:
    """The account of a job, its forward and backward not planned yet.

    Copies of the optimizers step on fake tensors, three times; the optimizers, the model and the
    random state stay as they are. A gradient is taken to be as large as its parameter, whatever
    the optimizer has for it.

    Args:
        around: what stands around the step.
        job: what happens around it.
        kernels: what measures workspaces.
        device: where it is counted; where the tensors are if ``None``.

    Raises:
        ForeignOptimizerError: an optimizer steps parameters that are not among those.
        OptimizerFailedError: its step fails on fake tensors; the message has its words.
    """
    _check_own(around, job.optimizers)
    states = [vars(optimizer) for optimizer in job.optimizers]
    with untouched(*states), torch.no_grad():
        return _Ledger(around, job, kernels or Kernels(), device).account()


class _Ledger:
    """Runs copies of a job's optimizers and writes down what there is."""

    def __init__(
        self, around: Around, job: Job, kernels: Kernels, device: torch.device | None
    ) -> None:
        self._job = job
        self._fakes = ahead.Fakes(around.tensors, device=device)
        self._copy = Copier(self._stand_in)
        parts = (*_parts(around), around.trained)
        self._around = Around(*(tuple(map(self._copy, part)) for part in parts))
        self._device = device_of(self._around.tensors)
        self._follower = Follower(self._fakes.mode, self._device, kernels)
        self._optimizers: Sequence[torch.optim.Optimizer] = [*map(self._copy, job.optimizers)]
        self._scaler = self._copy(job.scaler)
        pairs = zip(around.trained, self._around.trained, strict=True)
        self._trained = {own: kept_in(p) for p, own in pairs if own.is_leaf}
        self._buckets = {
            self._copy(p): torch.empty_like(self._copy(p), requires_grad=False)
            for p, _ in around.buckets
        }
        self._in_buckets = {self._copy(p) for p, holds_gradient in around.buckets if holds_gradient}

    def _stand_in(self, tensor: torch.Tensor) -> torch.Tensor:
        is_number = tensor.numel() <= 1 and tensor.device.type == "cpu"
        if is_number and not isinstance(tensor, nn.Parameter) and not autograd.is_fake(tensor):
            return tensor.detach().clone()
        found = self._fakes(tensor)
        if found.is_leaf:
            found.grad = None
        return found

    def account(self) -> Account:
        follower, around = self._follower, self._around
        held = [follower.hold(part) for part in _parts(around)]
        beside, places = self._hold_buckets()
        now = follower.hold(_tensors_in(self._optimizers))
        before = follower.live_bytes
        # Where gradients stand there later, nothing is higher in the first than in a later one.
        phases = [] if self._job.keeps_gradients else [JobPhase(FIRST_PASS, before, None)]
        gradients = self._make_gradients()
        with optimizers.as_on_plain_tensors(), wrappers.shapes_of_the_whole_aside():
            phases += self._update(FIRST_UPDATE)
            later: list[JobPhase] = []
            for _ in range(1, STEPS):
                self._drop_gradients()
                stands = follower.live_bytes
                self._make_gradients()
                later = _highest(later, [JobPhase(PASS, stands, None), *self._update(UPDATE)])
        self._drop_gradients(to_none=True)
        states = follower.live_bytes - before + now
        if self._job.keeps_gradients:
            later[0] = JobPhase(PASS, before - now + states + gradients, None)
        parameters, buffers, inputs = held
        return Account(
            device=str(self._device),
            job=str(self._job),
            parameters_bytes=parameters,
            buffers_bytes=buffers + beside,
            inputs_bytes=inputs,
            gradients_bytes=gradients + places,
            states_bytes=states,
            states_now_bytes=now,
            outputs_bytes=0,
            phases=tuple(_without_repeats([*phases, *later])),
        )

    def _hold_buckets(self) -> tuple[int, int]:
        """Bytes of buckets beside the gradients, and of those that the gradients lie in."""
        lie = [bucket for p, bucket in self._buckets.items() if p in self._in_buckets]
        own = self._follower.hold(lie)
        return self._follower.hold(self._buckets.values()), own

    def _make_gradients(self) -> int:
        missing = [parameter for parameter in self._trained if parameter.grad is None]
        for parameter in missing:
            dtype = self._trained[parameter]
            if dtype is not parameter.dtype:
                parameter.grad_dtype = dtype
            parameter.grad = self._place_of(parameter, dtype)
        return self._follower.hold(p.grad for p in missing if p.grad is not None)

    def _place_of(self, parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if parameter in self._in_buckets:
            return self._buckets[parameter]
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)

    def _drop_gradients(self, to_none: bool = False) -> None:
        if self._job.set_to_none or to_none:
            for parameter in self._trained:
                parameter.grad = None

    def _update(self, name: str) -> list[JobPhase]:
        """What happens between a backward and the next forward."""
        found = []
        if self._scaler is not None:
            self._scaler.scale(torch.ones(()))
        if self._job.clip_norm is not None:
            if self._scaler is not None:
                found.append(self._phase(UNSCALING, self._unscale))
            found.append(self._phase(CLIPPING, self._clip))
        found.append(self._phase(name, self._step))
        return found

    def _phase(self, name: str, part: Callable[[], None]) -> JobPhase:
        stands = self._follower.live_bytes
        try:
            return JobPhase(name, stands, self._follower.peak_of(part) - stands)
        except CkptPassError:
            raise
        except Exception as error:  # whatever the optimizer's own code raises
            raise OptimizerFailedError(
                f"The {name} fails on fake tensors ({self._job}): {type(error).__name__}: {error}. "
                "Expected a step that looks at no values of tensors but single numbers, and needs "
                "no closure. Give a budget= of what the optimizer leaves free."
            ) from error

    def _unscale(self) -> None:
        for optimizer in self._optimizers:
            self._scaler.unscale_(optimizer)

    def _clip(self) -> None:
        assert self._job.clip_norm is not None
        torch.nn.utils.clip_grad_norm_(self._trained, self._job.clip_norm)

    def _step(self) -> None:
        for optimizer in self._optimizers:
            if self._scaler is None:
                optimizer.step()
            else:
                self._scaler.step(optimizer)
        if self._scaler is not None:
            self._scaler.update()


def kept_in(parameter: torch.Tensor) -> torch.dtype:
    """The dtype that the gradient of a parameter is kept in; it may say so (``grad_dtype``)."""
    said = getattr(parameter, "grad_dtype", None) if parameter.is_leaf else None
    return said if isinstance(said, torch.dtype) else parameter.dtype


def _parts(around: Around) -> tuple[tuple[torch.Tensor, ...], ...]:
    return around.parameters, around.buffers, around.inputs


def _tensors_in(things: Iterable[torch.optim.Optimizer]) -> list[torch.Tensor]:
    return Reached([vars(thing) for thing in things]).tensors


def _highest(before: list[JobPhase], now: list[JobPhase]) -> list[JobPhase]:
    """Of each part of a step the higher one."""
    if not before:
        return now
    pairs = zip(before, now, strict=True)
    return [max(pair, key=lambda phase: phase.peak_bytes) for pair in pairs]


def _without_repeats(phases: list[JobPhase]) -> list[JobPhase]:
    """Phases by name, of those with one name the highest; the first ones where they differ."""
    found: dict[str, JobPhase] = {}
    for phase in phases:
        known = found.get(phase.name)
        if known is None or phase.peak_bytes > known.peak_bytes:
            found[phase.name] = phase
    firsts = ((FIRST_PASS, PASS), (FIRST_UPDATE, UPDATE))
    same = {one for one, other in firsts if one in found and _alike(found[one], found[other])}
    return [found[name] for name in PHASES if name in found and name not in same]


def _alike(one: JobPhase, other: JobPhase) -> bool:
    return (one.standing_bytes, one.above_bytes) == (other.standing_bytes, other.above_bytes)


def _check_own(around: Around, given: Iterable[torch.optim.Optimizer]) -> None:
    known = {id(tensor) for tensor in around.tensors}
    for optimizer in given:
        for number, group in enumerate(optimizer.param_groups):
            for place, parameter in enumerate(group["params"]):
                if id(parameter) not in known:
                    where = f"Parameter {place} of group {number} of the {type(optimizer).__name__}"
                    raise ForeignOptimizerError(
                        f"{where}, {list(parameter.shape)} of {parameter.dtype}, is none of the "
                        f"model's {len(around.parameters)} parameters. {_EXPECTED_OPTIMIZER}"
                    )
