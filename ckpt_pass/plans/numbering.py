"""Equal things written once, and named by their numbers."""

from __future__ import annotations

from typing import Any


class Numbering:
    """Numbers equal things, in the order in which they come."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}

    def number(self, thing: Any) -> int:
        """The number of a thing."""
        return self._numbers.setdefault(thing, len(self._numbers))

    @property
    def things(self) -> list[Any]:
        """The things by number, tuples as lists."""
        return [list(t) if isinstance(t, tuple) else t for t in self._numbers]
