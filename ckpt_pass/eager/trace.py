"""Record an eager training step on fake tensors, as often as it takes to know its way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ckpt_pass._torch import ahead, autograd, modules
from ckpt_pass.eager.answers import Answers, real_answers
from ckpt_pass.eager.constants import Constants
from ckpt_pass.eager.first_use import warn_if_another
from ckpt_pass.eager.real_numbers import Maker, StaleNumbers, is_number
from ckpt_pass.eager.recorder import Recorder
from ckpt_pass.eager.replicas import replicas_alone
from ckpt_pass.eager.step_record import EagerTrace
from ckpt_pass.eager.trace_ops import statistics_of, storage_ids
from ckpt_pass.graph.cost import beside_bytes
from ckpt_pass.graph.kernels import Kernels
from ckpt_pass.state.holders import Reached
from ckpt_pass.state.untouched import untouched


@dataclass(frozen=True)
class Surroundings:
    """What there is around a step.

    Attributes:
        again: whether it is another microbatch, which finds what one before it has left: the step
            runs twice then, and the second time is recorded.
        staged: whether it is a stage of a pipeline: it holds its outputs until its backward has
            run, and receives their gradients where there was room for them.
    """

    again: bool = False
    staged: bool = False


def trace_step(
    model: nn.Module,
    args: tuple[Any, ...],
    loss_fn: Callable[[Any], torch.Tensor] | None,
    kwargs: Mapping[str, Any] | None = None,
    kernels: Kernels | None = None,
    how: Surroundings | None = None,
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
    it goes with these inputs. Gradients that are there are not: the step makes its own.
    """
    how = how or Surroundings()
    step = _Step(model, args, loss_fn, dict(kwargs or {}), kernels or Kernels(), how)
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
    how: Surroundings

    def recorded(self, answers: Answers | None, faked: frozenset[Maker]) -> EagerTrace:
        """The record of the step on fake tensors."""
        roots = self.model, self.loss_fn, self.args, self.kwargs
        fakes, constants = ahead.Fakes(Reached(roots).tensors), Constants()

        def stand_in(tensor: torch.Tensor) -> torch.Tensor:
            real = not (is_number(tensor) or autograd.is_fake(tensor) or tensor.is_meta)
            if real:
                return tensor.detach().clone()
            found = fakes(tensor)
            if found.grad_fn is not None and not tensor._is_view():
                found = found.detach().requires_grad_()  # its history is no part of the step
            if not (autograd.is_fake(tensor) or tensor.is_meta):
                constants.give(found, tensor)
            if found.is_leaf:
                found.grad = None  # a step begins without gradients: those that are there need less
            return found

        with untouched(*roots, stand_in=stand_in) as (_, _, args, kwargs):
            buffers = dict(self.model.named_buffers())
            moved = statistics_of(self.model)
            statistics = frozenset(storage_ids(buffers[name] for name in moved))
            known = frozenset(storage_ids(buffers.values()))

            held: list[Any] = []

            def run() -> Any:
                return self._run(args, kwargs, held if self.how.staged else None)

            def recorder(found: Answers | None) -> Recorder:
                return Recorder(
                    self.model, fakes.mode, known, statistics, self.kernels, found, faked, constants
                )

            alone = replicas_alone(self.model)
            with modules.converted_by_replacement(self.model), alone, ahead.without_log():
                left = beside = 0
                if self.how.again:
                    before = recorder(answers)
                    before.record(run, self.how.staged)
                    held.clear()
                    _let_go_of_gradients(args, kwargs)
                    left, beside = before.memory.left_bytes, _beside_gradients(self.model)
                    answers = None if answers is None else answers.anew()
                now = recorder(answers)
                trace = now.record(run, self.how.staged)
                trace.found_bytes = left
                trace.beside_gradients_bytes = beside or _beside_gradients(self.model)
                if self.how.staged:
                    trace.passed_bytes = _passed_bytes(trace, args, kwargs)
                elif not self.how.again and (kept := self._kept(now, args, kwargs)):
                    answers = None if answers is None else answers.anew()
                    following = recorder(answers).record_forward(run)
                    warn_if_another(self.model, trace, kept, following)
                return trace

    def _kept(self, step: Recorder, *given: Any) -> tuple[int, ...]:
        """The storages that a step leaves; what autocast has in its cache is no other step's."""
        cached = {number for op in step.trace.ops if op.cached for number in op.makes}
        left = step.memory.left_beside(self._held(*given))
        return tuple(number for number in left if number not in cached)

    def _held(self, *given: Any) -> list[torch.Tensor]:
        """What a step may leave: gradients, and parameters, which FSDP2 pads on its own."""
        tensors = [t for t in tree_leaves(given) if isinstance(t, torch.Tensor) and t.is_leaf]
        tensors += self.model.parameters()
        return [*tensors, *(t.grad for t in tensors if t.grad is not None)]

    def real(self) -> Any:
        """The forward on real tensors."""
        with untouched(self.model, self.loss_fn, self.args, self.kwargs, values=True):
            return self._run(self.args, self.kwargs)

    def _run(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], held: list[Any] | None = None
    ) -> Any:
        output = self.model(*args, **kwargs)
        if held is not None:
            held.append(output)
        return self.loss_fn(output) if self.loss_fn is not None else output


def _beside_gradients(model: nn.Module) -> int:
    return beside_bytes(p.grad for p in model.parameters() if p.grad is not None)


def _passed_bytes(trace: EagerTrace, *given: Any) -> int:
    leaves = [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]
    back = sum(leaf.nbytes for leaf in leaves if leaf.is_leaf and leaf.requires_grad)
    whole = (call for call in trace.calls if not call.name)
    on = sum(trace.storages[s].nbytes for call in whole for s in call.outputs)
    return back + on


def _let_go_of_gradients(*given: Any) -> None:
    """What a batch's own tensors got, the next one does not find."""
    for leaf in tree_leaves(given):
        if isinstance(leaf, torch.Tensor) and leaf.is_leaf:
            leaf.grad = None
