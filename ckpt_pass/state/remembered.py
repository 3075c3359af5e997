"""What is found out of a class or a module once, and let go with it.

Nothing is written on either, nor is either kept alive: what was found lies in a table, by the
``id`` of what it was found of, until that is gone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

Key = TypeVar("Key")
Found = TypeVar("Found")


class Remembered(Generic[Key, Found]):
    """A function of a class or module that remembers what it has found.

    Args:
        find: the function. What it finds must not lead back to what it was found of, which would
            never be let go: it refers weakly to whatever may.
    """

    __slots__ = ("_find", "_found", "_references")

    def __init__(self, find: Callable[[Key], Found]) -> None:
        self._find = find
        self._found: dict[int, Found] = {}
        self._references: dict[int, weakref.ref[Any]] = {}

    def __call__(self, key: Key) -> Found:
        """What the function says."""
        try:
            return self._found[id(key)]
        except KeyError:
            return self._note(key)

    def _note(self, key: Key) -> Found:
        number, founds, references = id(key), self._found, self._references

        def gone(_: object) -> None:
            founds.pop(number, None)
            references.pop(number, None)

        found = self._find(key)
        references[number] = weakref.ref(key, gone)
        founds[number] = found
        return found

    def forget(self, key: Key) -> None:
        """Find out anew, next time."""
        self._found.pop(id(key), None)
