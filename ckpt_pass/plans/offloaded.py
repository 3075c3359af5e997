"""What a plan moves to another place and back: when, how much, and what the step waits for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ckpt_pass.plans.wording import format_bytes, format_seconds

#: Values named in a listing; the rest are counted.
LINES = 10


@dataclass(frozen=True, slots=True)
class MovedActivation:
    """One saved value that leaves the device; all times are modelled, from the step's beginning.

    Attributes:
        name: what makes it, in words.
        nbytes: of its storage.
        again_s: seconds of the op that makes it: to recompute it takes that at least.
        copies_s: seconds of its two copies.
        out_start_s, out_end_s: of its copy out.
        released_s, fetched_s: the device's memory is free from the one to the other.
        in_start_s, in_end_s: of its copy back.
        used_s: the backward reads it first.
    """

    name: str
    nbytes: int
    again_s: float
    copies_s: float
    out_start_s: float
    out_end_s: float
    released_s: float
    fetched_s: float
    in_start_s: float
    in_end_s: float
    used_s: float

    @property
    def why(self) -> str:
        """The reason, with figures that a reader can check."""
        return (
            f"copies {format_seconds(self.copies_s)}; "
            f"its op alone takes {format_seconds(self.again_s)} again"
        )

    def __str__(self) -> str:
        return (
            f"{format_bytes(self.nbytes):>10}  {self.name}: "
            f"goes at {format_seconds(self.out_start_s)}, free from "
            f"{format_seconds(self.released_s)}; asked for at {format_seconds(self.fetched_s)}, "
            f"read at {format_seconds(self.used_s)} ({self.why})"
        )


@dataclass(frozen=True)
class Offloaded:
    """The link over a step, and what it moves.

    Attributes:
        where: the place, in words.
        out_bytes_per_s, in_bytes_per_s: how fast the link was taken to be.
        step_time_s: modelled seconds of the step, with recomputation and waiting.
        stall_s: of them, what ops wait for copies.
        out_busy_s, in_busy_s: what copies take each way.
        host_peak_bytes: the most bytes at the other place.
        values: what moves, in the order in which it goes.
    """

    where: str
    out_bytes_per_s: float
    in_bytes_per_s: float
    step_time_s: float
    stall_s: float
    out_busy_s: float
    in_busy_s: float
    host_peak_bytes: int
    values: tuple[MovedActivation, ...]

    @property
    def moved_bytes(self) -> int:
        """Bytes that go, and come back."""
        return sum(value.nbytes for value in self.values)

    @property
    def hidden_share(self) -> float:
        """The share of the copies' time that nothing waits for; 1 where nothing is moved."""
        busy_s = self.out_busy_s + self.in_busy_s
        return 1.0 if busy_s <= 0 else max(0.0, 1.0 - self.stall_s / busy_s)

    @property
    def busy_share(self) -> float:
        """The share of the step in which the busier direction of the link copies."""
        busy_s = max(self.out_busy_s, self.in_busy_s)
        return min(busy_s / self.step_time_s, 1.0) if self.step_time_s else 0.0

    def summary_lines(self) -> Iterator[str]:
        """Two lines of a plan's summary."""
        rates = (f"{rate / 1e9:.3g} GB/s" for rate in (self.out_bytes_per_s, self.in_bytes_per_s))
        out, back = rates
        yield (
            f"offload      {len(self.values)} values, {format_bytes(self.moved_bytes)} "
            f"{self.where}, at {out} and back at {back}; at most "
            f"{format_bytes(self.host_peak_bytes)} there"
        )
        yield (
            f"link         busy in {100 * self.busy_share:.0f} % of the step's "
            f"{format_seconds(self.step_time_s)}; {100 * self.hidden_share:.0f} % of the copies "
            f"behind compute, {format_seconds(self.stall_s)} waited for"
        )

    def listing_lines(self) -> Iterator[str]:
        """The largest values, one a line."""
        if not self.values:
            return
        ranked = sorted(self.values, key=lambda value: (-value.nbytes, value.out_start_s))
        yield "offloaded, most bytes first"
        yield from map(str, ranked[:LINES])
        if ranked[LINES:]:
            yield f"  and {len(ranked) - LINES} that are no larger"
