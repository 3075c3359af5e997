"""What a user says about offloading: where values go, how many bytes, how fast the link is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ckpt_pass._errors import CkptPassError, nearest
from ckpt_pass.amounts import parsed_bytes

TARGETS = ("host", "disk")


class InvalidOffloadError(CkptPassError, ValueError):
    """Options for offloading that make no sense."""


@dataclass(frozen=True)
class Offload:
    """Keep values somewhere else between forward and backward; a frozen value.

    Attributes:
        to: ``"host"`` (pinned memory for values of a CUDA device, plain memory for those of the
            CPU) or ``"disk"`` (a file without a name in ``folder``).
        host_budget: the most that may lie there, in bytes or as ``"32GiB"``; no limit where
            ``None``. For a disk it is the size of the file.
        d2h_bytes_per_s: how fast values go, in bytes per second, for planning; measured once where
            ``None`` (:func:`ckpt_pass.offloading.rates.measured_rates`).
        h2d_bytes_per_s: how fast they come back, likewise.
        folder: where the file lies; a folder of the user's own in the system's one for temporary
            files where ``None``. That may be memory (tmpfs): name one on a disk then.
        min_bytes: smaller values are kept where they are.

    Raises:
        InvalidOffloadError: a value that makes no sense.
    """

    to: str = "host"
    host_budget: int | str | None = None
    d2h_bytes_per_s: float | None = None
    h2d_bytes_per_s: float | None = None
    folder: str | Path | None = None
    min_bytes: int = 1024

    #: How many values may be on their way at once, before the oldest of them is waited for.
    IN_FLIGHT: ClassVar[int] = 5

    def __post_init__(self) -> None:
        if self.to not in TARGETS:
            raise InvalidOffloadError(
                f"Got to={self.to!r}, expected one of {', '.join(TARGETS)}."
                f"{nearest(str(self.to), TARGETS)}"
            )
        for name in ("d2h_bytes_per_s", "h2d_bytes_per_s"):
            rate = getattr(self, name)
            if rate is not None and not (_is_number(rate) and 0 < rate < math.inf):
                raise InvalidOffloadError(
                    f"Got {name}={rate!r}, expected a number of bytes per second above 0, or None "
                    "to have it measured."
                )
        if not _is_count(self.min_bytes) or self.min_bytes < 0:
            raise InvalidOffloadError(
                f"Got min_bytes={self.min_bytes!r}, expected a number of bytes, 0 or more."
            )
        if self.folder is not None and not isinstance(self.folder, (str, Path)):
            raise InvalidOffloadError(
                f"Got folder={self.folder!r} of type {type(self.folder).__name__}, expected a path."
            )
        if self.folder is not None and self.to != "disk":
            raise InvalidOffloadError(
                f"Got folder={str(self.folder)!r} with to={self.to!r}: only a disk has folders. "
                "Leave it out, or say to='disk'."
            )
        _ = self.host_budget_bytes  # checked now, not in the first step

    @property
    def host_budget_bytes(self) -> int | None:
        """The budget in bytes.

        Raises:
            InvalidOffloadError: it is no amount of memory.
        """
        given = self.host_budget
        found: int | None = None
        if isinstance(given, str):
            found = parsed_bytes(given)
        elif given is None:
            return None
        elif _is_count(given):
            found = given
        if found is None or found <= 0:
            raise InvalidOffloadError(
                f"Got host_budget={given!r}, expected an amount such as '32GiB', a positive number "
                "of bytes, or None for no limit."
            )
        return found

    def __str__(self) -> str:
        limit = "" if self.host_budget is None else f", at most {self.host_budget}"
        return f"offload to {self.to}{limit}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_offload_inputs(asked: Any) -> None:
    """Raise where ``offload_inputs`` is no switch.

    Raises:
        InvalidOffloadError: it is neither ``True`` nor ``False``.
    """
    if not isinstance(asked, bool):
        raise InvalidOffloadError(
            f"Got offload_inputs={asked!r}, expected True or False. Where values go is said with "
            "offload=."
        )
