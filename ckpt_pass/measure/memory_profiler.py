"""Memory of any stretch of code: a ``with`` block around a training step, timeline and peak.

On the CPU every allocation and release is an event of torch's profiler. On CUDA the peak is the
caching allocator's own, the timeline the profiler's, and torch's snapshot can be written beside
them. Bytes are above what was allocated when the block began.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import profile, record_function

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch.collector import quiet_collector
from ckpt_pass.drawing.figures import (
    COLOURS,
    GREY,
    MEGABYTE,
    figure_of,
    label_peak,
    memory_axes,
    write,
)
from ckpt_pass.measure.allocations import Recording, profiled, read_recording

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARK = "ckpt_pass::memory::"
_WHOLE = f"{_MARK}whole"
#: Allocations and releases that torch's snapshot keeps, with a stack each (torch's own default
#: is without bound).
_HISTORY = 200_000


class NothingRecordedError(CkptPassError):
    """A memory profiler was asked before its block had ended."""


class ProfilerInUseError(CkptPassError):
    """A memory profiler was entered twice."""


class SnapshotError(CkptPassError):
    """A snapshot was asked for where torch makes none."""


@dataclass(frozen=True)
class Phase:
    """A named part of a recorded block.

    Attributes:
        begin_s, end_s: seconds since the block began.
        peak_bytes: the most above the start of the *block* while the phase ran; 0 or more.
    """

    name: str
    begin_s: float
    end_s: float
    peak_bytes: int


@dataclass(frozen=True)
class MemoryRecord:
    """Memory over a block of code; prints itself.

    Attributes:
        device: whose memory.
        peak_bytes: the most above the start; 0 or more.
        held_bytes: above the start when the block ended: gradients, say.
        duration_s: of the block, under the profiler.
        timeline: (seconds since the block began, bytes above its start), one an allocation or
            release, as the profiler reports them.
        phases: in the order in which they began.
    """

    device: str
    peak_bytes: int
    held_bytes: int
    duration_s: float
    timeline: tuple[tuple[float, int], ...]
    phases: tuple[Phase, ...] = ()

    @property
    def peak_at_s(self) -> float:
        """The first moment at which the timeline is highest."""
        return max(self.timeline, key=lambda point: point[1])[0]

    def plot(self, path: str | Path, *, title: str = "memory of a step") -> Path:
        """Draw the timeline and its phases as a PNG; return its path.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        return _plot(self, title, Path(path))

    def __str__(self) -> str:
        lines = [
            f"peak {self.peak_bytes / MEGABYTE:.2f} MB, held at the end "
            f"{self.held_bytes / MEGABYTE:.2f} MB, {self.duration_s * 1e3:.1f} ms under the "
            f"profiler, on {self.device}"
        ]
        width = max((len(phase.name) for phase in self.phases), default=0)
        for phase in self.phases:
            span = (phase.end_s - phase.begin_s) * 1e3
            peak = phase.peak_bytes / MEGABYTE
            lines.append(f"  {phase.name:{width}}  peak {peak:10.2f} MB  {span:10.1f} ms")
        return "\n".join(lines)


class MemoryProfiler:
    """Record the memory of whatever runs inside a ``with`` block.

    Args:
        device: whose memory; the current CUDA device if there is one, else the CPU.
        snapshot: on CUDA, also write torch's snapshot of all allocations with their stacks here
            (``torch.cuda.memory._dump_snapshot``, for pytorch.org/memory_viz).

    The collector of cyclic garbage rests inside. A profiler can be used again, not nested; torch
    runs one profiler at a time. Events of the CPU are those of the whole process; torch's reporter
    knows the size of what it saw allocated, so that releases of older blocks (gradients of the step
    before, dropped inside) are missing: drop them before the block.

    Raises:
        SnapshotError: a snapshot of a device other than CUDA.
    """

    def __init__(
        self, device: torch.device | str | None = None, *, snapshot: str | Path | None = None
    ) -> None:
        self._device = _resolved(device)
        if snapshot is not None and self._device.type != "cuda":
            raise SnapshotError(
                f"Got snapshot= for {self._device}; torch keeps a history of CUDA's allocator "
                "only. Expected device='cuda'; on the CPU leave it out and use .timeline."
            )
        self._snapshot = None if snapshot is None else Path(snapshot)
        self._stack: contextlib.ExitStack | None = None
        self._session: profile | None = None
        self._at_start = 0
        self._names: list[str] = []
        self._record: MemoryRecord | None = None

    @property
    def record(self) -> MemoryRecord:
        """What was recorded.

        Raises:
            NothingRecordedError: the block has not ended, or it raised.
        """
        if self._record is None:
            raise NothingRecordedError(
                "Nothing is recorded yet. Expected a block that has ended without an error: "
                "with MemoryProfiler() as memory: ...; then memory.record."
            )
        return self._record

    @property
    def peak_bytes(self) -> int:
        """The most bytes above the start of the block."""
        return self.record.peak_bytes

    @property
    def timeline(self) -> tuple[tuple[float, int], ...]:
        """(Seconds since the block began, bytes above its start)."""
        return self.record.timeline

    def plot(self, path: str | Path, *, title: str = "memory of a step") -> Path:
        """Draw the timeline as a PNG: see :meth:`MemoryRecord.plot`."""
        return self.record.plot(path, title=title)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name a part of the block: ``with memory.phase("backward"): loss.backward()``."""
        self._names.append(name)
        with record_function(f"{_MARK}{len(self._names) - 1}"):
            yield

    def __enter__(self) -> MemoryProfiler:
        if self._stack is not None:
            raise ProfilerInUseError(
                "This memory profiler is in use already. Expected one block at a time; name parts "
                "of a block with memory.phase(...)."
            )
        self._record, self._names = None, []
        with contextlib.ExitStack() as stack:
            stack.enter_context(quiet_collector())
            if self._device.type == "cuda":
                stack.enter_context(self._on_cuda())
            self._session = stack.enter_context(profiled())
            stack.enter_context(record_function(_WHOLE))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._stack is not None and self._session is not None
        stack, self._stack = self._stack, None
        peak = self._allocator_peak() if kind is None else None
        stack.__exit__(kind, error, traceback)
        if kind is None:
            recording = read_recording(
                self._session, self._device, lambda name: name.startswith(_MARK)
            )
            self._record = _recorded(recording, self._names, str(self._device), peak)
        self._session = None

    @contextlib.contextmanager
    def _on_cuda(self) -> Iterator[None]:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        self._at_start = torch.cuda.memory_allocated(self._device)
        if self._snapshot is None:
            yield
            return
        torch.cuda.memory._record_memory_history(max_entries=_HISTORY, device=self._device)
        try:
            yield
            torch.cuda.memory._dump_snapshot(str(self._snapshot))
        finally:
            torch.cuda.memory._record_memory_history(enabled=None, device=self._device)

    def _allocator_peak(self) -> int | None:
        """What CUDA's allocator says, which rounds blocks up and so knows better than events."""
        if self._device.type != "cuda":
            return None
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - self._at_start


def _resolved(device: torch.device | str | None) -> torch.device:
    found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return found


def _recorded(
    recording: Recording, names: list[str], device: str, allocator_peak: int | None
) -> MemoryRecord:
    begin_ns, end_ns = recording.spans[_WHOLE]
    level, timeline = 0, [(0.0, 0)]
    for event in recording.allocations:
        if begin_ns <= event.time_ns <= end_ns:
            level += event.nbytes
            timeline.append(((event.time_ns - begin_ns) * 1e-9, level))
    phases = []
    for number, name in enumerate(names):
        if f"{_MARK}{number}" not in recording.spans:
            continue  # of another thread, which this profiler does not follow
        first, last = recording.spans[f"{_MARK}{number}"]
        begin_s, end_s = (first - begin_ns) * 1e-9, (last - begin_ns) * 1e-9
        phases.append(Phase(name, begin_s, end_s, _highest(timeline, begin_s, end_s)))
    peak = max(n for _, n in timeline) if allocator_peak is None else allocator_peak
    duration_s = (end_ns - begin_ns) * 1e-9
    return MemoryRecord(device, peak, level, duration_s, tuple(timeline), tuple(phases))


def _highest(timeline: list[tuple[float, int]], begin_s: float, end_s: float) -> int:
    """The most bytes between two moments, what there was at the first included."""
    before = next((n for moment, n in reversed(timeline) if moment <= begin_s), 0)
    return max([0, before, *(n for moment, n in timeline if begin_s <= moment <= end_s)])


def _plot(record: MemoryRecord, title: str, path: Path) -> Path:
    figure = figure_of(width=9.0, height=4.5)
    axes = figure.add_subplot()
    axes.set_title(title)
    moments = [*(moment * 1e3 for moment, _ in record.timeline), record.duration_s * 1e3]
    levels = [*(n / MEGABYTE for _, n in record.timeline), record.held_bytes / MEGABYTE]
    axes.fill_between(moments, levels, step="post", color=COLOURS[1], alpha=0.2)
    axes.step(moments, levels, where="post", color=COLOURS[1], linewidth=1.2)
    highest = max(levels)
    label = f"time since the block began (ms, under the profiler, {record.device})"
    memory_axes(axes, label, moments[-1], highest or 1.0)
    _mark_phases(axes, record)
    label_peak(axes, record.peak_at_s * 1e3, highest, COLOURS[2])
    return write(figure, path)


def _mark_phases(axes: Axes, record: MemoryRecord) -> None:
    """A dotted line where each phase begins, and its name to the right of it."""
    height = axes.get_ylim()[1] * 0.985  # just under the upper edge
    look: dict[str, Any] = {"color": GREY, "verticalalignment": "top", "fontsize": 9}
    for phase in record.phases:
        begin = phase.begin_s * 1e3
        late = begin > 0.9 * axes.get_xlim()[1]  # no room for words on the right
        side = "right" if late else "left"
        axes.axvline(begin, color=GREY, linestyle=":", linewidth=1.0)
        axes.text(begin, height, f" {phase.name} ", horizontalalignment=side, **look)
