"""The peak of a step as inductor generated it: its code is run dry, and its storages are counted.

The generated code decides what is allocated, reused and freed, and when. It is run under fake
tensors with kernels that do nothing: forward, then backward on what the forward saved, each value
held by whom it is held on the real run. The bytes alive after each allocation are those of the
real run, and kernels of libraries allocate besides what they were measured to
(:mod:`ckpt_pass.graph.kernels`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch import functorch
from ckpt_pass._torch.generated import GeneratedHalf
from ckpt_pass._torch.operators import HigherOrderOperator
from ckpt_pass._torch.random_states import in_parts
from ckpt_pass.graph.calls import fake_like, open_like
from ckpt_pass.graph.held import HeldBytes, device_type_of
from ckpt_pass.graph.kernel_run import FAILURES
from ckpt_pass.ops.taxonomy import op_name
from ckpt_pass.policy.sites import Bytes


class DryRunError(CkptPassError):
    """Inductor's code cannot be followed without data, so that its peak is not known beforehand."""

    def __init__(self, half: GeneratedHalf, reason: str) -> None:
        which = "backward" if half.is_backward else "forward"
        super().__init__(
            f"The {which} that inductor generated cannot be followed without running it, so that "
            f"its peak is not known beforehand: {reason}. A budget needs Python wrappers, of "
            "values in plain memory (no sparse gradients) whose sizes do not depend on data. Leave "
            "out inductor's cpp_wrapper and fx_wrapper, use inner='aot_eager', whose peak is the "
            "plan's, or give no budget."
        )


@dataclass(frozen=True)
class StepPeak:
    """The most bytes at any time of a step, and where that is, in words.

    Attributes:
        forward, backward: the most while either half runs.
        between: what the caller has, and what is saved, when the forward has run.
    """

    nbytes: int
    where: str
    forward: int = 0
    backward: int = 0
    between: int = 0


def step_peak(halves: Sequence[GeneratedHalf]) -> StepPeak:
    """The peak of a step above what was there when it began.

    Of sizes that are symbolic, those that were traced with count. Where one half is missing
    (nothing is computed in it) the other one's peak is the step's.

    Raises:
        DryRunError: the code needs data to be run.
    """
    with functorch.real_tensors():
        step = _Step(halves)
        step.through()
        return step.peak()


def run_dry(half: GeneratedHalf, constants: Mapping[str, Any], args: list[Any]) -> list[Any]:
    """Run the code of a half on fake tensors; ``args`` is emptied, as on the real run.

    Args:
        half: what inductor generated.
        constants: stand for the module's own.
        args: what it is given.

    Raises:
        DryRunError: the code needs data to be run.
    """
    try:
        return list(half.dry(constants)(args))
    except FAILURES as error:
        text = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise DryRunError(half, text) from error


def open_lifetimes(halves: Sequence[GeneratedHalf]) -> tuple[tuple[int, int, Bytes], ...]:
    """When each storage of a step is made and gone, and its bytes at every size.

    Raises:
        DryRunError: the code needs data to be run.
    """
    with functorch.real_tensors(), functorch.open_sizes(_symbolic(halves)) as sizes:
        step = _Step(halves, sizes)
        step.through()
        return step.memory.held.open_lifetimes()


def _symbolic(halves: Sequence[GeneratedHalf]) -> list[torch.SymInt]:
    """The sizes of a step that were left open."""
    given = [value for half in halves for value in half.inputs]
    sizes = [size for value in given if isinstance(value, Tensor) for size in value.shape]
    return [value for value in (*given, *sizes) if isinstance(value, torch.SymInt)]


class _Step:
    """A step that is run dry.

    Args:
        halves: what inductor generated.
        sizes: of symbols that stay open; those that were traced stand for them if it is ``None``.
    """

    def __init__(self, halves: Sequence[GeneratedHalf], sizes: Any = None) -> None:
        self.halves = halves
        self.open = sizes is not None
        self.fake = functorch.FakeTensorMode(allow_non_fake_inputs=True, shape_env=sizes)
        inputs = [v for half in halves for v in half.inputs if isinstance(v, Tensor)]
        self.memory = _Memory(self.fake, device_type_of(inputs), calls=not self.open)
        #: Parameters, inputs and constants: they were there before, and stay.
        self.outside: list[Any] = []
        #: When the forward had run, and what was held then.
        self.border = self.between = 0

    def through(self) -> None:
        """Run forward and backward."""
        forward = next((half for half in self.halves if not half.is_backward), None)
        backward = next((half for half in self.halves if half.is_backward), None)
        returned = self.run(forward, self.inputs_of(forward)) if forward is not None else []
        held = self.memory.held
        self.border, self.between = held.moment, held.alive_bytes
        if backward is not None:
            self.backward(backward, forward, returned)

    def peak(self) -> StepPeak:
        """The most bytes at any time, workspaces of the kernels called among them."""
        curve = self.memory.held.curve()
        forward, backward = curve.most(0, self.border), curve.most(self.border)
        return StepPeak(curve.most(), curve.peak_at, forward, backward, self.between)

    def like(self, value: Any) -> Any:
        """What stands for a value of the traced step."""
        return open_like(value) if self.open else fake_like(value)

    def inputs_of(self, half: GeneratedHalf) -> list[Any]:
        """What a half is traced with, as fake tensors that were there before."""
        with self.fake:
            made = [self.like(value) for value in half.inputs]
        self.outside += made
        return list(made)

    def run(self, half: GeneratedHalf, args: list[Any]) -> list[Any]:
        """Run one half; ``args`` is emptied, as on the real run."""
        with self.fake:
            constants = {name: self.like(value) for name, value in half.constants.items()}
        self.outside.append(constants)
        self.memory.half = "backward" if half.is_backward else "forward"
        with self.fake, self.memory:
            return run_dry(half, constants, args)

    def backward(
        self, half: GeneratedHalf, forward: GeneratedHalf | None, returned: list[Any]
    ) -> None:
        """Run the backward on what the forward returned last; the caller keeps the rest."""
        parameters = self.outside[: len(forward.inputs) if forward is not None else 0]
        if forward is None:
            returned = self.inputs_of(half)[: half.given]
        saved = returned[len(returned) - half.given :]
        kept = returned[: len(returned) - half.given]
        returned.clear()
        numbers = [value for value in saved if not isinstance(value, Tensor)]
        args = [*numbers, *(value for value in saved if isinstance(value, Tensor))]
        del saved
        with self.fake, self.memory:
            tangents = [self.like(value) for value in half.inputs[half.given :]]
            _arrive(tangents)
            kept += _held_by_autograd(tangents)
        gradients = self.run(half, [*_emptied(args), *_emptied(tangents)])
        with self.fake, self.memory:
            _accumulate(gradients, parameters)
        del kept


def _arrive(tangents: Sequence[Any]) -> None:
    """Gradients may arrive contiguous (of outputs that no loss reads, autograd makes zeros).

    AOTAutograd then copies those of outputs that lie otherwise, while all of them are there.
    """
    given = (value for value in tangents if isinstance(value, Tensor))
    others = [value for value in given if not value.is_contiguous()]
    arriving = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in others]
    del arriving


def _held_by_autograd(tangents: Sequence[Any]) -> list[Any]:
    """The tangents that something besides the backward holds to its end.

    Of a step that returns its loss, that is the loss's, which ``backward`` was called with; those
    of its other outputs (zeros, where no loss reads them) are the backward's alone. Where nothing
    says which output the loss is, any of them may be given by the caller.
    """
    if not functorch.lets_go_of_tangents():
        return list(tangents)
    losses = [t for t in tangents if isinstance(t, Tensor) and t.dim() == 0]
    return losses or list(tangents)


def _emptied(values: list[Any]) -> list[Any]:
    """The values, no longer in the list that they came in."""
    found = list(values)
    values.clear()
    return found


def _accumulate(gradients: list[Any], parameters: Sequence[Any]) -> None:
    """What autograd does with gradients: it keeps them, or copies of another layout.

    One that is laid out as its parameter is taken over, another is copied (torch's "gradient
    layout contract", ``torch/csrc/autograd/utils/grad_layout_contract.h``); so is one that is the
    gradient of several parameters, but for the last.
    """
    for index, parameter in enumerate(parameters[: len(gradients)]):
        gradient = gradients[index]
        if not isinstance(gradient, Tensor) or not isinstance(parameter, Tensor):
            continue
        shared = any(other is gradient for other in gradients[index + 1 :])
        if shared or not _laid_out_as(gradient, parameter):
            gradients[index] = torch.empty_like(parameter, dtype=gradient.dtype)


def _laid_out_as(gradient: Tensor, parameter: Tensor) -> bool:
    if not _is_dense(parameter):
        return gradient.is_contiguous()
    steps = zip(gradient.shape, gradient.stride(), parameter.stride(), strict=True)
    return all(ours == theirs if size != 1 else ours != 0 for size, ours, theirs in steps)


def _is_dense(value: Tensor) -> bool:
    """Whether the elements lie side by side, in whatever order of the dimensions."""
    count = 1
    for step, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size != 1 and step != count:
            return not value.numel()
        count *= size
    return True


class _Memory(TorchDispatchMode):
    """Counts the storages that ops make, until nothing holds them any more."""

    supports_higher_order_operators = True

    def __init__(self, fake: functorch.FakeTensorMode, device_type: str, calls: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = HeldBytes(fake, device_type, calls)
        self.half = ""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            with self:
                return in_parts(func, args, kwargs)
        result = func(*args, **kwargs)
        where = f"in the {self.half} that inductor generated, at {op_name(func)}"
        self.held.note(func, args, kwargs, result, where)
        return result
