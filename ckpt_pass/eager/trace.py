"""Record an eager training step on fake tensors, as often as it takes to know its way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ckpt_pass._torch import ahead, autograd, modules
from ckpt_pass.eager.answers import Answers, real_answers
from ckpt_pass.eager.constants import Constants
from ckpt_pass.eager.real_numbers import Maker, StaleNumbers, is_number
from ckpt_pass.eager.recorder import Recorder
from ckpt_pass.eager.step_record import EagerTrace
from ckpt_pass.eager.trace_ops import statistics_of
from ckpt_pass.graph.kernels import Kernels
from ckpt_pass.state.holders import Reached
from ckpt_pass.state.untouched import untouched


def trace_step(
    model: nn.Module,
    args: tuple[Any, ...],
    loss_fn: Callable[[Any], torch.Tensor] | None,
    kwargs: Mapping[str, Any] | None = None,
    kernels: Kernels | None = None,
    keeps_gradients: bool = False,
) -> EagerTrace:
    """Record forward and backward of ``loss_fn(model(*args, **kwargs))`` on fake tensors.

    What kernels return is made to look as it really does: some are run for that, on made-up data.

    Raises:
        NothingToDifferentiateError: there is no backward.
        OtherPathError: the forward goes another way when it is called again.

    The model, its arguments and the random state stay as they are. Whole numbers and masks that do
    not depend on parameters are real: models look at them (an attention mask that masks nothing is
    left out), and would take another way if they were fake. Where the forward looks at other
    values, it is run once for real (:mod:`ckpt_pass.eager.answers`); the record is of the way that
    it goes with these inputs. Gradients that are there are not: the step makes its own. With
    ``keeps_gradients`` every parameter has one before, which the step adds to.
    """
    step = _Step(model, args, loss_fn, dict(kwargs or {}), kernels or Kernels(), keeps_gradients)
    answers: Answers | None = None
    faked: frozenset[Maker] = frozenset()
    while True:
        try:
            return step.recorded(answers.anew() if answers is not None else None, faked)
        except autograd.NO_VALUES:
            if answers is not None:
                raise
            answers = real_answers(step.real)
        except StaleNumbers as found:
            faked |= {found.maker}


@dataclass(frozen=True)
class _Step:
    """A step that can be run on tensors of either kind; nothing of it is changed."""

    model: nn.Module
    args: tuple[Any, ...]
    loss_fn: Callable[[Any], torch.Tensor] | None
    kwargs: Mapping[str, Any]
    kernels: Kernels
    keeps_gradients: bool

    def recorded(self, answers: Answers | None, faked: frozenset[Maker]) -> EagerTrace:
        """The record of the step on fake tensors."""
        roots = self.model, self.loss_fn, self.args, self.kwargs
        fakes, constants = ahead.Fakes(Reached(roots).tensors), Constants()

        def stand_in(tensor: torch.Tensor) -> torch.Tensor:
            real = not (is_number(tensor) or autograd.is_fake(tensor) or tensor.is_meta)
            if real:
                return tensor.detach().clone()
            found = fakes(tensor)
            if not (autograd.is_fake(tensor) or tensor.is_meta):
                constants.give(found, tensor)
            if found.is_leaf:
                found.grad = None  # a step begins without gradients: those that are there need less
                if self.keeps_gradients and found.requires_grad and found._is_param:
                    found.grad = torch.empty_like(found, requires_grad=False)
            return found

        with untouched(*roots, stand_in=stand_in) as (_, _, args, kwargs):
            buffers = dict(self.model.named_buffers())
            moved = statistics_of(self.model)
            statistics = frozenset(buffers[name].untyped_storage()._cdata for name in moved)
            recorder = Recorder(
                self.model, fakes.mode, statistics, self.kernels, answers, faked, constants
            )
            with modules.converted_by_replacement(self.model):
                return recorder.record(lambda: self._run(args, kwargs))

    def real(self) -> Any:
        """The forward on real tensors."""
        with untouched(self.model, self.loss_fn, self.args, self.kwargs, values=True):
            return self._run(self.args, self.kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        output = self.model(*args, **kwargs)
        return self.loss_fn(output) if self.loss_fn is not None else output
