"""The link to another place for values: host memory, or a disk behind it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ckpt_pass._errors import CkptPassError


class InvalidLinkError(CkptPassError):
    """A link's rates, latency, engines or bytes are no such numbers."""


@dataclass(frozen=True)
class Link:
    """How fast values leave the device and come back, and how much may lie on the other side.

    A copy occupies its queue for ``latency_s`` and then bytes / rate.

    Attributes:
        out_bytes_per_s: from the device to the other side.
        in_bytes_per_s: back to the device.
        latency_s: of each copy, whatever its size.
        engines: copy queues: with 2 each direction has its own, with 1 they share one.
        host_bytes: the most bytes on the other side at any moment; ``None`` for no limit.

    Raises:
        InvalidLinkError: a rate is not positive and finite, or another number is out of range.
    """

    out_bytes_per_s: float
    in_bytes_per_s: float
    latency_s: float = 0.0
    engines: int = 2
    host_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("out_bytes_per_s", "in_bytes_per_s"):
            rate = getattr(self, name)
            if not _is_number(rate) or rate <= 0:
                raise InvalidLinkError(
                    f"Got {name}={rate!r}, expected a positive, finite number of bytes a second. "
                    "Give 25e9 for 25 GB/s."
                )
        if not _is_number(self.latency_s) or self.latency_s < 0:
            raise InvalidLinkError(
                f"Got latency_s={self.latency_s!r}, expected a number of seconds, 0 or more. "
                "Give 1e-5 for ten microseconds."
            )
        if isinstance(self.engines, bool) or self.engines not in (1, 2):
            raise InvalidLinkError(
                f"Got engines={self.engines!r}, expected 1 or 2: 2 where copies out and copies in "
                "run side by side, 1 where they share a queue."
            )
        most = self.host_bytes
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 0):
            raise InvalidLinkError(
                f"Got host_bytes={most!r}, expected a number of bytes, 0 or more, or None for no "
                "limit."
            )

    def out_s(self, nbytes: float) -> float:
        """Seconds of one copy out."""
        return self.latency_s + nbytes / self.out_bytes_per_s

    def in_s(self, nbytes: float) -> float:
        """Seconds of one copy in."""
        return self.latency_s + nbytes / self.in_bytes_per_s

    def may_hold(self, nbytes: int) -> bool:
        """Whether so many bytes may lie on the other side."""
        return self.host_bytes is None or nbytes <= self.host_bytes


def _is_number(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return math.isfinite(value)
