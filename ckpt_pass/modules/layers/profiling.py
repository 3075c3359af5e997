"""What each layer of a model costs: bytes from a recorded step, times from real ones."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ckpt_pass._errors import CkptPassError, nearest
from ckpt_pass._torch import autograd
from ckpt_pass.eager.planning import traced
from ckpt_pass.eager.step_record import CallRecord, EagerTrace
from ckpt_pass.measure.gradients import gradients_restored
from ckpt_pass.measure.timing import clock_for, resting_collector
from ckpt_pass.modules.layers.find import find_layers
from ckpt_pass.modules.layers.layer_profile import LayerProfile
from ckpt_pass.regions.wrapping import regions_of
from ckpt_pass.state.untouched import untouched

#: Timed steps; each gives every layer one sample, and the median of a layer's samples counts.
ROUNDS = 5

LossFn = Callable[[Any], Tensor]


class ProfileError(CkptPassError):
    """Layers that cannot be profiled."""


def profile_layers(
    model: nn.Module,
    *args: Any,
    layers: Sequence[str] | None = None,
    loss_fn: LossFn | None = None,
    rounds: int = ROUNDS,
    **kwargs: Any,
) -> tuple[LayerProfile, ...]:
    """What each layer of a model costs in a training step of ``model(*args, **kwargs)``.

    Bytes are those of a step recorded on fake tensors (:mod:`ckpt_pass.eager.trace`), which takes
    no memory, so that a step may be profiled that does not fit. Times are of real steps on the
    model's device: marks at each layer's call, and where the gradients of its output and of its
    input arrive. Nothing is trained: gradients, buffers and random states are given back.

    Args:
        model: a model without regions. A scalar output is the loss; of others, without
            ``loss_fn``, every tensor gets a gradient of ones.
        args, kwargs: its arguments.
        layers: FQNs, in the order in which they run; found by
            :func:`ckpt_pass.find_layers` where ``None``.
        loss_fn: applied to the model's output.
        rounds: timed steps, after an untimed one; with 0 all times are 0, and no step runs.

    Returns:
        One profile a layer; a layer that is called several times has the sum of its calls.

    Raises:
        ProfileError: a layer is not in the model, is never called, or the model has regions.
        NoLayersError: no layers were found.
        NotTraceableError, NothingToDifferentiateError: see :func:`ckpt_pass.plan`.
    """
    names = tuple(find_layers(model).names if layers is None else layers)
    modules = _modules(model, names)
    trace = traced(model, args, loss_fn, kwargs)
    found = _Bytes(trace, model, names)
    step = _Step(model, args, kwargs, loss_fn)
    times = step.timed({name: modules[name] for name in names}, rounds)
    return tuple(
        LayerProfile(
            name=name,
            activation_bytes=found.activations(name),
            output_bytes=found.outputs(name),
            forward_s=times[name][0],
            backward_s=times[name][1],
            parameters=sum(parameter.numel() for parameter in modules[name].parameters()),
            input_bytes=found.inputs(index),
            gradient_bytes=_gradient_bytes(modules[name]),
            working_bytes=found.working(name),
        )
        for index, name in enumerate(names)
    )


def _modules(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise ProfileError(
                f"{type(model).__name__} has no module {name!r}.{nearest(name, modules)} Expected "
                "FQNs as named_modules() gives them."
            )
    regions = regions_of(model)
    if regions:
        raise ProfileError(
            f"{type(model).__name__} has {len(regions)} checkpoint regions ({next(iter(regions))}, "
            "...), whose layers save nothing and run twice. Expected the plain model. Call "
            "ckpt_pass.remove(model) first."
        )
    return modules


def _gradient_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)


# --- bytes ----------------------------------------------------------------------------------


class _Bytes:
    """Reads the bytes of layers off a recorded step."""

    def __init__(self, trace: EagerTrace, model: nn.Module, names: Sequence[str]) -> None:
        self._trace = trace
        self._names = names
        self._calls: dict[str, list[CallRecord]] = defaultdict(list)
        for call in trace.calls:
            self._calls[call.name].append(call)
        for name in names:
            if not self._calls[name]:
                raise ProfileError(
                    f"The layer {name!r} of {type(model).__name__} is not called in this step. "
                    "Expected layers that run; leave it out of layers=."
                )

    def _sum(self, storages: set[int]) -> int:
        return sum(self._trace.storages[number].nbytes for number in storages)

    def _made(self, call: CallRecord) -> Iterator[int]:
        """What the call saved and made itself."""
        first, last = call.ops
        for value in self._trace.saved[slice(*call.values)]:
            if value.storage >= 0 and first <= self._trace.storages[value.storage].born < last:
                yield value.storage

    def activations(self, name: str) -> int:
        """Distinct storages that autograd saved inside and the layer made, its outputs apart."""
        return sum(self._sum(set(self._made(c)) - set(c.outputs)) for c in self._calls[name])

    def outputs(self, name: str) -> int:
        """Distinct storages that the layer returned."""
        return sum(self._sum(set(call.outputs)) for call in self._calls[name])

    def _outside(self, name: str) -> set[int]:
        """The storages of the step that a layer's ops use and did not make."""
        found: set[int] = set()
        for call in self._calls[name]:
            for op in self._trace.ops[slice(*call.ops)]:
                found |= {s for s in op.uses if self._trace.storages[s].born < call.ops[0]}
        return found

    def inputs(self, index: int) -> int:
        """What a layer uses and did not make; what its neighbour uses too (a mask) is no input."""
        beside = index + 1 if index + 1 < len(self._names) else index - 1
        shared = self._outside(self._names[beside]) if len(self._names) > 1 else set()
        return self._sum(self._outside(self._names[index]) - shared)

    def working(self, name: str) -> int:
        """The most that the layer's backward holds besides saved values and gradients that stay.

        Its backward begins with the first use of a value that it saved, and ends with the last.
        """
        moments = {
            self._trace.asked[number]
            for call in self._calls[name]
            for number in range(*call.values)
            if number in self._trace.asked
        }
        if not moments:
            return 0
        first, last = min(moments), max(moments)
        end = len(self._trace.ops)
        passing = [
            (s.born, s.dies, s.nbytes)
            for s in self._trace.storages
            if s.born >= self._trace.forward_length and s.dies < end
        ]
        levels = [0] * (last - first + 1)
        for born, dies, nbytes in passing:
            for moment in range(max(born, first), min(dies, last) + 1):
                levels[moment - first] += nbytes
        return max(levels)


# --- times ----------------------------------------------------------------------------------


class _Clock:
    """Marks of time: the host's, or events in the queue of an accelerator."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._now = clock_for(device)

    def mark(self) -> Any:
        """This moment."""
        if not self._cuda:
            return self._now()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Until all marks are reached."""
        if self._cuda:
            torch.cuda.synchronize(self._device)

    def between(self, first: Any, last: Any) -> float:
        """Seconds between two marks."""
        return float(first.elapsed_time(last) * 1e-3 if self._cuda else last - first)


class _Call:
    """The marks of one call of a layer."""

    def __init__(self, clock: _Clock) -> None:
        self._clock = clock
        self.begin = clock.mark()
        self.end: Any = None
        self.backward_begin: Any = None
        self.backward_end: Any = None

    def on_output(self, _gradient: Tensor) -> None:
        """A gradient of the output is there: the first one begins the backward."""
        self.backward_begin = self.backward_begin or self._clock.mark()

    def on_input(self, _gradient: Tensor) -> None:
        """A gradient of an input is there: that of a value others use too may come much later."""
        self.backward_end = self.backward_end or self._clock.mark()


class _Step:
    """The user's step, run for its times."""

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        loss_fn: LossFn | None,
    ) -> None:
        self._model, self._args, self._kwargs = model, args, dict(kwargs)
        self._loss_fn = loss_fn
        given = [v for v in tree_leaves((args, self._kwargs)) if isinstance(v, Tensor)]
        self._leaves = [t for t in (*model.parameters(), *given) if t.requires_grad and t.is_leaf]
        self._device = next((t.device for t in (*model.parameters(), *given)), torch.device("cpu"))

    def timed(self, layers: Mapping[str, nn.Module], rounds: int) -> dict[str, tuple[float, float]]:
        """Seconds of the forward and the backward of each layer: medians over the rounds."""
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in layers}
        with (
            untouched(self._model, self._loss_fn, self._args, self._kwargs, values=True),
            gradients_restored(self._leaves),
            autograd.without_accumulated_hooks(self._leaves),
            resting_collector(),
        ):
            for number in range(rounds + 1 if rounds else 0):
                for name, sample in self._once(layers).items():
                    if number:  # the first one warms up
                        samples[name].append(sample)
        return {name: _medians(found) for name, found in samples.items()}

    def _once(self, layers: Mapping[str, nn.Module]) -> dict[str, tuple[float, float]]:
        for leaf in self._leaves:
            leaf.grad = None
        clock = _Clock(self._device)
        calls: dict[str, list[_Call]] = {name: [] for name in layers}
        with _marked(layers, calls, clock):
            output = self._model(*self._args, **self._kwargs)
        self._backward(output if self._loss_fn is None else self._loss_fn(output))
        end = clock.mark()
        clock.wait()
        return {name: _seconds(found, clock, end) for name, found in calls.items()}

    def _backward(self, output: Any) -> None:
        found = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        torch.autograd.backward(found, [torch.ones_like(tensor) for tensor in found])


@contextmanager
def _marked(
    layers: Mapping[str, nn.Module], calls: Mapping[str, list[_Call]], clock: _Clock
) -> Iterator[None]:
    """Hooks that mark each call of each layer."""
    with ExitStack() as stack:
        for name, layer in layers.items():
            for handle in _hooks(layer, calls[name], clock):
                stack.callback(handle.remove)
        yield


def _hooks(layer: nn.Module, calls: list[_Call], clock: _Clock) -> Iterator[Any]:
    def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
        call = _Call(clock)
        for tensor in _differentiable((args, kwargs)):
            tensor.register_hook(call.on_input)
        calls.append(call)

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        call = calls[-1]
        for tensor in _differentiable(output):
            tensor.register_hook(call.on_output)
        call.end = clock.mark()

    yield layer.register_forward_pre_hook(enter, with_kwargs=True)
    yield layer.register_forward_hook(leave)


def _differentiable(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.requires_grad]


def _seconds(calls: list[_Call], clock: _Clock, end: Any) -> tuple[float, float]:
    forward = backward = 0.0
    for call in calls:
        forward += clock.between(call.begin, call.end)
        if call.backward_begin is not None:
            backward += clock.between(call.backward_begin, call.backward_end or end)
    return forward, backward


def _medians(samples: list[tuple[float, float]]) -> tuple[float, float]:
    if not samples:
        return 0.0, 0.0
    forward, backward = zip(*samples, strict=True)
    return statistics.median(forward), statistics.median(backward)
