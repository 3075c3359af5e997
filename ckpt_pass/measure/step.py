"""What one real training step costs: peak and saved bytes, flops, time.

Bytes are those *above what was allocated when the step began* (the meaning of a budget), flops are
those of the operators that really ran (recomputation included), times are in seconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.profiler import profile, record_function

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch.collector import quiet_collector
from ckpt_pass.measure.allocations import profiled, read_recording
from ckpt_pass.measure.gradients import GradientComparison as GradientComparison
from ckpt_pass.measure.gradients import GradientMismatchError as GradientMismatchError
from ckpt_pass.measure.gradients import NoLossError as NoLossError
from ckpt_pass.measure.gradients import compare_gradients as compare_gradients
from ckpt_pass.measure.gradients import gradients_restored, is_loss, rng_restored
from ckpt_pass.ops.flops import FlopCounter

Step = Callable[[], object]
"""One training step: returns its loss, or has called backward itself."""

Curve = tuple[tuple[float, int], ...]
"""(Seconds since the start, bytes above the start) at each change."""


class UnknownParametersError(CkptPassError):
    """The step ran its own backward, and nobody said whose gradients it fills."""

    def __init__(self) -> None:
        super().__init__(
            "measure_step cannot tell which gradients the step fills: it returned no scalar with a "
            "live autograd graph, so it seems to call backward itself. Expected such a scalar, or "
            "params=. Pass params=model.parameters(), or return the loss without calling backward."
        )


class MeasureArgumentError(CkptPassError):
    """A count handed to :func:`measure_step` is too small."""

    def __init__(self, name: str, got: int, least: int) -> None:
        super().__init__(f"measure_step got {name}={got}; expected at least {least}. Raise {name}.")


@dataclass(frozen=True)
class Measurement:
    """One training step, measured.

    ``saved_bytes`` is what is allocated between forward and backward, the loss included; it is
    ``None`` if the step called backward itself. ``timeline`` has one (seconds since the start,
    bytes above the start) per allocation and release; ``backward_at_s`` is when its backward began.
    """

    peak_bytes: int
    saved_bytes: int | None
    flops: int
    time_s: float
    timeline: tuple[tuple[float, int], ...]
    device: str
    backward_at_s: float | None = None

    def __str__(self) -> str:
        saved = "unknown" if self.saved_bytes is None else f"{self.saved_bytes / 1e6:.1f} MB"
        return (
            f"peak {self.peak_bytes / 1e6:.1f} MB, saved {saved}, {self.flops / 1e9:.2f} Gflop, "
            f"{self.time_s * 1e3:.1f} ms on {self.device}"
        )


def measure_step(
    fn: Step,
    *,
    device: torch.device | str | None = None,
    warmup: int = 1,
    repeats: int = 3,
    backward: bool | None = None,
    params: Iterable[Tensor] | None = None,
) -> Measurement:
    """Run the training step ``fn`` several times; return its peak, flops and time.

    ``fn`` returns a scalar loss, whose backward is then called here, or calls backward itself
    (``backward=False``; then ``params`` says whose gradients it fills). ``backward=None`` finds
    out which. Without ``params`` they are the leaves of the loss's graph; pass them where that
    hides them (reentrant checkpoints, autograd functions that run a graph of their own).

    Gradients are set to ``None`` before each run, so that theirs are counted, and are given back
    at the end; every run starts from the same state of torch's random generators. What else ``fn``
    changes (buffers, optimizer state) it changes in each of ``warmup + repeats + 3`` runs, one
    less where ``params`` is given. The collector of cyclic garbage rests during a run.

    On the CPU, bytes come from the profiler's allocation events of the whole process; on CUDA the
    peak is the caching allocator's. Flops are counted on the operators that are dispatched, in
    eager mode and in compiled graphs alike; of Inductor's code that is every matmul, convolution
    and attention that it leaves to a library, not those it generates itself (Triton or C++
    templates, as ``max-autotune`` makes them), and not user-written kernels.

    Raises:
        MeasureArgumentError: ``warmup`` below 0 or ``repeats`` below 1.
        NoLossError: ``backward=True``, and ``fn`` returned no scalar that requires grad.
        UnknownParametersError: ``fn`` calls backward itself, and ``params`` is not given.
    """
    for name, got, least in (("warmup", warmup, 0), ("repeats", repeats, 1)):
        if got < least:
            raise MeasureArgumentError(name, got, least)
    known = params is not None
    leaves = list(params) if params is not None else _find_leaves(fn, device, backward)
    where = _resolve_device(device, leaves)
    runner = _Runner(fn, where, backward, leaves, known)
    with gradients_restored(leaves):
        for _ in range(warmup):
            runner.run()
        time_s = statistics.median(runner.run() for _ in range(repeats))
        with FlopCounter() as counter:
            runner.run()
        peak_bytes, saved_bytes, timeline, begins_s = runner.run_profiled()
    began_s = None if saved_bytes is None else begins_s
    return Measurement(
        peak_bytes, saved_bytes, counter.flops, time_s, timeline, str(where), began_s
    )


@dataclass(frozen=True)
class _Runner:
    """Runs the step from the same state each time: no gradients, the same random numbers."""

    fn: Step
    device: torch.device
    backward: bool | None
    leaves: list[Tensor]
    params_given: bool

    FORWARD: ClassVar[str] = "ckpt_pass::forward"
    BACKWARD: ClassVar[str] = "ckpt_pass::backward"

    def run(self) -> float:
        """Run once; return the seconds it took."""
        with self._prepared():
            start = time.perf_counter()
            self._step()
            self._synchronise()
            return time.perf_counter() - start

    def run_profiled(self) -> tuple[int, int | None, Curve, float]:
        """Run once under the profiler.

        Returns:
            The peak, saved bytes (or ``None``), the timeline, and when the backward began.
        """
        cuda = self.device.type == "cuda"
        with self._prepared():
            at_start = torch.cuda.memory_allocated(self.device) if cuda else 0
            if cuda:
                torch.cuda.reset_peak_memory_stats(self.device)
            with profiled() as session:
                own_backward = not self._step()
                self._synchronise()
            timeline, at_backward, begins_s = _read_events(session, self.device)
            peak = max(count for _, count in timeline)
            if cuda:  # the allocator knows better than the events: it rounds blocks up
                peak = torch.cuda.max_memory_allocated(self.device) - at_start
        return peak, None if own_backward else at_backward, timeline, begins_s

    def _step(self) -> bool:
        """Run forward and backward; return whether the backward was ours to call."""
        with record_function(self.FORWARD):
            result = self.fn()
        filled = self.backward is None and any(leaf.grad is not None for leaf in self.leaves)
        ours = self.backward is not False and not filled and is_loss(result)
        if self.backward and not ours:
            raise NoLossError(result)
        if not ours and not self.params_given:
            raise UnknownParametersError()
        with record_function(self.BACKWARD):
            if ours and isinstance(result, Tensor):
                result.backward()
        return ours

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        for leaf in self.leaves:
            leaf.grad = None
        with rng_restored(self.device), quiet_collector():
            self._synchronise()
            yield
            for leaf in self.leaves:
                leaf.grad = None


def _find_leaves(
    fn: Step, device: torch.device | str | None, backward: bool | None
) -> list[Tensor]:
    """Run the forward once and walk from its loss to the leaves whose gradients it will fill."""
    if backward is False:
        raise UnknownParametersError()
    with rng_restored(torch.device(device) if device is not None else None):
        result = fn()
    if not isinstance(result, Tensor) or not is_loss(result):
        raise NoLossError(result) if backward else UnknownParametersError()
    return _leaves_of(result)


def _leaves_of(result: Tensor) -> list[Tensor]:
    """Return the tensors behind the ``AccumulateGrad`` nodes that ``result`` depends on."""
    if result.grad_fn is None:  # the loss is a leaf itself
        return [result]
    leaves: list[Tensor] = []
    pending: list[Any] = [result.grad_fn]
    seen = set(pending)
    while pending:
        node = pending.pop()
        variable = getattr(node, "variable", None)  # only AccumulateGrad has it
        if isinstance(variable, Tensor):
            leaves.append(variable)
        following = {child for child, _ in getattr(node, "next_functions", ()) if child is not None}
        pending += following - seen
        seen |= following
    return leaves


def _resolve_device(device: torch.device | str | None, leaves: list[Tensor]) -> torch.device:
    if device is None:
        kinds = [leaf.device for leaf in leaves if leaf.device.type == "cuda"]
        return kinds[0] if kinds else torch.device("cpu")
    found = torch.device(device)
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return found


def _read_events(session: profile, device: torch.device) -> tuple[Curve, int, float]:
    """Add up the profiler's memory events: the timeline, bytes and moment of the backward."""
    marks = {_Runner.FORWARD, _Runner.BACKWARD}
    recording = read_recording(session, device, marks.__contains__)
    begin_ns, _ = recording.spans[_Runner.FORWARD]
    at_backward_ns, _ = recording.spans[_Runner.BACKWARD]
    count = 0
    timeline = [(0.0, 0)]
    for event in recording.allocations:
        count += event.nbytes
        timeline.append(((event.time_ns - begin_ns) * 1e-9, count))
    held = recording.balance_before(at_backward_ns)
    return tuple(timeline), held, (at_backward_ns - begin_ns) * 1e-9
