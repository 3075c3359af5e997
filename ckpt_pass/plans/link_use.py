"""What a plan moves to another place and back: when, how much, and what the step waits for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ckpt_pass.planner.clock import Transfer
from ckpt_pass.plans.wording import format_bytes, format_seconds

#: Values named in a listing; the rest are counted.
LINES = 10


@dataclass(frozen=True, slots=True)
class MovedActivation:
    """One saved value that leaves the device.

    Attributes:
        name: what makes it, in words.
        again_s: seconds of the op that makes it: to recompute it takes that at least.
        transfer: its way out and back, by the clock.
    """

    name: str
    again_s: float
    transfer: Transfer

    @property
    def nbytes(self) -> int:
        """Bytes of its storage."""
        return self.transfer.nbytes

    @property
    def copies_s(self) -> float:
        """Seconds of its two copies."""
        way = self.transfer
        return way.out_end_s - way.out_start_s + way.in_end_s - way.in_start_s

    @property
    def why(self) -> str:
        """The reason, with figures that a reader can check."""
        return (
            f"copies {format_seconds(self.copies_s)}; "
            f"its op alone takes {format_seconds(self.again_s)} again"
        )

    def __str__(self) -> str:
        way = self.transfer
        return (
            f"{format_bytes(self.nbytes):>10}  {self.name}: "
            f"goes at {format_seconds(way.out_start_s)}, free from "
            f"{format_seconds(way.released_s)}; asked for at {format_seconds(way.fetched_s)}, "
            f"read at {format_seconds(way.used_s)} ({self.why})"
        )


@dataclass(frozen=True)
class LinkUse:
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
        ranked = sorted(self.values, key=lambda value: (-value.nbytes, value.transfer.out_start_s))
        yield "offloaded, most bytes first"
        yield from map(str, ranked[:LINES])
        if ranked[LINES:]:
            yield f"  and {len(ranked) - LINES} that are no larger"
