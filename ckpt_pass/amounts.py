"""Amounts of memory as people write them."""

from __future__ import annotations

import re

UNITS = {
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)},
}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*")


def parsed_bytes(text: str) -> int | None:
    """The bytes of ``"6GiB"`` or ``"500 MB"``; ``None`` where it is no number with a unit."""
    match = _AMOUNT.fullmatch(text)
    if match is None or match[2].lower() not in UNITS:
        return None
    return int(float(match[1]) * UNITS[match[2].lower()])
