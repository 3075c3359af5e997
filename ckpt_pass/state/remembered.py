"""What is found out of a class or a module once, and let go with it.

Nothing is written on either. What was found may lead back to its class or module, which nothing but
these themselves could hold without keeping them alive; so it is forgotten before each full garbage
collection, which finds such circles, and found out anew after it.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

Key = TypeVar("Key")
Found = TypeVar("Found")


class Remembered(Generic[Key, Found]):
    """A function of a class or module that remembers what it has found.

    Args:
        find: the function.
        let_go: forgets what was found as far as it may lead back; all of it where ``None``.
    """

    __slots__ = ("__weakref__", "_find", "_found", "_let_go", "_references")

    def __init__(
        self, find: Callable[[Key], Found], let_go: Callable[[Found], None] | None = None
    ) -> None:
        self._find = find
        self._let_go = let_go
        self._found: dict[int, Found] = {}
        self._references: dict[int, weakref.ref[Any]] = {}
        _all.add(self)

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

    def let_go(self) -> None:
        """Hold nothing that may lead back to its key."""
        if self._let_go is None:
            self._found.clear()
            return
        for found in list(self._found.values()):
            self._let_go(found)


_all: weakref.WeakSet[Remembered[Any, Any]] = weakref.WeakSet()
_LAST_GENERATION = 2


def _before_collection(phase: str, info: dict[str, int]) -> None:
    if phase == "start" and info["generation"] == _LAST_GENERATION:
        for remembered in list(_all):
            remembered.let_go()


gc.callbacks.append(_before_collection)
