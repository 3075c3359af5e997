"""What a budget means: the peak, over forward and backward, above what was allocated before."""

from __future__ import annotations

from typing import TypeAlias

import torch

from ckpt_pass._errors import CkptPassError
from ckpt_pass.amounts import parsed_bytes

#: ``"6GiB"``, bytes, a fraction of the peak without recomputation, or ``"device"``.
BudgetLike: TypeAlias = str | int | float

#: Kept free on the device with ``budget="device"``: the allocator's fragmentation and libraries'
#: own memory are not in the plan. torch's own out-of-memory advice reserves as much.
DEVICE_RESERVE = 0.08


class InvalidBudgetError(CkptPassError):
    """A budget that is no amount of memory."""

    def __init__(self, got: object, why: str) -> None:
        super().__init__(
            f"Got budget={got!r}: {why}. Expected an amount such as '6GiB' or '500 MB', a positive "
            "number of bytes, a fraction above 0 and at most 1 of the peak without recomputation, "
            "or 'device'."
        )


def parse_budget(text: str) -> BudgetLike:
    """A budget typed on a command line: a bare number is bytes, or a fraction with a point."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        return text


def free_device_bytes() -> int | None:
    """Bytes that the current accelerator could still allocate, torch's cache included."""
    if not torch.cuda.is_available():
        return None
    free, _total = torch.cuda.mem_get_info()
    return int(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())


def check_budget(budget: BudgetLike) -> BudgetLike:
    """Return ``budget`` if it can mean something; raise :class:`InvalidBudgetError` if not."""
    resolve_budget(budget, 1 << 40, look_at_device=False)
    return budget


def resolve_budget(
    budget: BudgetLike, plain_peak_bytes: int, *, look_at_device: bool = True
) -> int:
    """The budget in bytes.

    Args:
        budget: what the user gave.
        plain_peak_bytes: the peak of the same step with nothing recomputed; fractions are of it.
        look_at_device: whether to ask the accelerator for its free memory.

    Raises:
        InvalidBudgetError: it is no amount of memory, or there is no accelerator to ask.
    """
    if isinstance(budget, str):
        return _parse(budget, look_at_device)
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise InvalidBudgetError(budget, f"it is of type {type(budget).__name__}")
    if budget <= 0:
        raise InvalidBudgetError(budget, "it is not positive")
    if isinstance(budget, int):
        return budget
    if not budget <= 1:
        raise InvalidBudgetError(budget, "a fraction is at most 1.0")
    return int(budget * plain_peak_bytes)


def _parse(text: str, look_at_device: bool) -> int:
    if text == "device":
        free = free_device_bytes() if look_at_device else 1
        if free is None:
            raise InvalidBudgetError(text, "there is no accelerator here")
        return int(free * (1 - DEVICE_RESERVE))
    nbytes = parsed_bytes(text)
    if nbytes is None:
        raise InvalidBudgetError(text, "it is no number with a unit (B, kB, MB, GB, KiB, MiB, GiB)")
    if nbytes <= 0:
        raise InvalidBudgetError(text, "it is not positive")
    return nbytes
