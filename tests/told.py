"""Notes that tests take inside of regions, and that no region puts back."""

from __future__ import annotations

from queue import SimpleQueue
from typing import Any


class Told:
    """Attributes that a queue holds: queues are not looked into."""

    def __init__(self) -> None:
        notes: SimpleQueue[dict[str, Any]] = SimpleQueue()
        notes.put({})
        object.__setattr__(self, "_notes", notes)

    def _all(self) -> dict[str, Any]:
        notes: SimpleQueue[dict[str, Any]] = self._notes
        found = notes.get()
        notes.put(found)
        return found

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self._all()[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self._all()[name] = value
