"""Allocations as they happen: the profiler's memory events, cut apart by marked spans.

``torch.profiler`` with ``profile_memory=True`` reports every allocation and release of a device's
allocator as an event named ``[memory]``; ``record_function`` puts named spans beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from ckpt_pass.measure.notices import without_notices


@dataclass(frozen=True, slots=True)
class Allocation:
    """An allocation (positive bytes) or a release (negative bytes)."""

    time_ns: int
    nbytes: int


@dataclass(frozen=True)
class Recording:
    """What the allocator of one device did during a profiled run.

    Attributes:
        allocations: in the order in which they happened.
        spans: begin and end, in nanoseconds on the same clock, of each span asked for by name.
    """

    allocations: tuple[Allocation, ...]
    spans: dict[str, tuple[int, int]]

    def balance_before(self, time_ns: int) -> int:
        """Bytes allocated and not released between the beginning and a moment."""
        return sum(event.nbytes for event in self.allocations if event.time_ns < time_ns)

    def peaks(self) -> dict[str, int]:
        """For each span, the most bytes above what was allocated when it began; 0 or more.

        Spans do not overlap.
        """
        found = dict.fromkeys(self.spans, 0)
        order = sorted(self.spans.items(), key=lambda item: item[1])
        place, count = 0, 0
        for event in self.allocations:
            while place < len(order) and order[place][1][1] < event.time_ns:
                place, count = place + 1, 0
            if place < len(order) and order[place][1][0] <= event.time_ns:
                count += event.nbytes
                name = order[place][0]
                found[name] = max(found[name], count)
        return found


@contextmanager
def profiled() -> Iterator[profile]:
    """A profiler session that records allocations."""
    session = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with without_notices():
        session.start()
    try:
        yield session
    finally:
        with without_notices():
            session.stop()


def read_recording(
    session: profile, device: torch.device, is_span: Callable[[str], bool]
) -> Recording:
    """Read what a session recorded, once it is over.

    Args:
        session: the session.
        device: whose allocations; those of others are left out.
        is_span: told the name of each span, whether it is wanted; of a name used
            twice the first span counts.
    """
    assert session.profiler is not None and session.profiler.kineto_results is not None
    kind = device.type.upper()  # kineto's DeviceType is named so: CPU, CUDA
    allocations: list[Allocation] = []
    spans: dict[str, tuple[int, int]] = {}
    for event in sorted(session.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        name = event.name()
        if name == "[memory]":
            elsewhere = device.index is not None and event.device_index() not in (device.index, -1)
            if event.device_type().name == kind and not elsewhere:
                nbytes = event.nbytes()  # type: ignore[attr-defined]  # torch's stub lacks it
                allocations.append(Allocation(event.start_ns(), nbytes))
        elif is_span(name):
            spans.setdefault(name, (event.start_ns(), event.end_ns()))
    return Recording(tuple(allocations), spans)
