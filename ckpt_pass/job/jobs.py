"""What a training job does around its steps, as a value."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch.amp.grad_scaler import GradScaler

from ckpt_pass._errors import CkptPassError


class InvalidJobError(CkptPassError):
    """A job's optimizer is none, or another part of it is not what it has to be."""


@dataclass(frozen=True)
class Job:
    """What happens around the forward and backward of a training step.

    Args:
        optimizer: what steps: an optimizer, or several that step one after the other.
        accumulate: microbatches whose gradients are added up before the optimizer steps.
        set_to_none: whether ``zero_grad`` drops the gradients (as by default), or keeps them, as
            zeros.
        clip_norm: the norm that ``torch.nn.utils.clip_grad_norm_`` clips all gradients to, if any.
        scaler: what scales the loss, if anything does.

    Attributes:
        optimizers: all of them.

    Raises:
        InvalidJobError: one of these is not what it has to be.
    """

    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer]
    accumulate: int = 1
    set_to_none: bool = True
    clip_norm: float | None = None
    scaler: GradScaler | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            given = self.optimizer
            several = tuple(given) if isinstance(given, Iterable) else ()
            if not several or not all(isinstance(o, torch.optim.Optimizer) for o in several):
                raise _no_optimizer(given)
            object.__setattr__(self, "optimizer", several)
        _check_closures(self.optimizers)
        count = self.accumulate
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise _not("accumulate", self.accumulate, "a whole number of microbatches, 1 or more")
        if not isinstance(self.set_to_none, bool):
            raise _not("set_to_none", self.set_to_none, "True or False")
        norm = self.clip_norm
        if norm is not None and not (_is_number(norm) and norm > 0):
            raise _not("clip_norm", norm, "a positive number, or None for no clipping")
        if self.scaler is not None and not isinstance(self.scaler, GradScaler):
            raise _not("scaler", self.scaler, "a torch.amp.GradScaler, or None")

    @property
    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """All of them, in the order in which they step."""
        one = self.optimizer
        return (one,) if isinstance(one, torch.optim.Optimizer) else tuple(one)

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients stand there while a forward and backward runs, sooner or later."""
        return self.accumulate > 1 or not self.set_to_none

    def __str__(self) -> str:
        words = [", ".join(type(one).__name__ for one in self.optimizers)]
        if self.accumulate > 1:
            words.append(f"{self.accumulate} microbatches a step")
        if self.clip_norm is not None:
            words.append(f"gradients clipped to {self.clip_norm:g}")
        if self.scaler is not None:
            words.append("loss scaled")
        words.append("gradients " + ("set to None" if self.set_to_none else "kept as zeros"))
        return ", ".join(words)


#: An optimizer, several, or a job that says more.
JobLike: TypeAlias = Job | torch.optim.Optimizer | Iterable[torch.optim.Optimizer]


def as_job(job: JobLike) -> Job:
    """What is meant by an ``optimizer`` argument.

    Raises:
        InvalidJobError: it is no optimizer.
    """
    return job if isinstance(job, Job) else Job(job)


def _is_number(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return math.isfinite(value)


def _not(name: str, got: object, expected: str) -> InvalidJobError:
    return InvalidJobError(f"Got {name}={got!r}, expected {expected}.")


def _no_optimizer(got: object) -> InvalidJobError:
    expected = "a torch.optim.Optimizer, or several: torch.optim.AdamW(model.parameters()), say"
    return _not("optimizer", got, expected)


def _check_closures(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise InvalidJobError(
                "Got an LBFGS optimizer, which runs the model itself, as often as it takes. "
                "Expected one that steps on gradients alone. Give a budget= of what its history "
                "leaves free."
            )
