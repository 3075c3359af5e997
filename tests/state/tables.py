"""Tables that are made at first use and kept, in a file that models do not live in."""

from __future__ import annotations

import contextvars
import functools
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor


def made(rows: int) -> Tensor:
    return torch.linspace(0, 1, rows)[:, None]


_BY_ROWS: dict[int, Tensor] = {}
_last: Tensor | None = None
_here = threading.local()
_context: contextvars.ContextVar[Any] = contextvars.ContextVar("table", default=None)


def in_a_dict(rows: int) -> Tensor:
    if rows not in _BY_ROWS:
        _BY_ROWS[rows] = made(rows)
    return _BY_ROWS[rows]


def in_a_global(rows: int) -> Tensor:
    global _last
    if _last is None:
        _last = made(rows)
    return _last


def on_the_function(rows: int) -> Tensor:
    if not hasattr(on_the_function, "table"):
        on_the_function.table = made(rows)  # type: ignore[attr-defined]
    return on_the_function.table  # type: ignore[attr-defined, no-any-return]


def of_the_thread(rows: int) -> Tensor:
    if not hasattr(_here, "table"):
        _here.table = made(rows)
    return _here.table  # type: ignore[no-any-return]


def of_the_context(rows: int) -> Tensor:
    if _context.get() is None:
        _context.set(made(rows))
    return _context.get()  # type: ignore[no-any-return]


remembered = functools.cache(made)


@functools.lru_cache(maxsize=2)
def remembered_pair(rows: int) -> dict[str, list[Tensor]]:
    return {"both": [made(rows), torch.zeros(rows, 1)]}


def of_a_pair(rows: int) -> Tensor:
    one, other = remembered_pair(rows)["both"]
    return one + other


def memo(function: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    kept: dict[int, Tensor] = {}

    @functools.wraps(function)
    def run(rows: int) -> Tensor:
        if rows not in kept:
            kept[rows] = function(rows)
        return kept[rows]

    return run


decorated = memo(made)


class Shelf:
    """Keeps tables for its class, for itself, and in a slot."""

    of_all: ClassVar[dict[int, Tensor]] = {}
    __slots__ = ("own",)

    def __init__(self) -> None:
        self.own: Tensor | None = None

    @classmethod
    def of_the_class(cls, rows: int) -> Tensor:
        if rows not in cls.of_all:
            cls.of_all[rows] = made(rows)
        return cls.of_all[rows]

    @classmethod
    def added_to_the_class(cls, rows: int) -> Tensor:
        if not hasattr(cls, "late"):
            cls.late = made(rows)  # type: ignore[attr-defined]
        return cls.late  # type: ignore[attr-defined, no-any-return]

    @staticmethod
    @functools.lru_cache
    def static(rows: int) -> Tensor:
        return made(rows)

    def of_its_own(self, rows: int) -> Tensor:
        if self.own is None:
            self.own = made(rows)
        return self.own


_SHELF = Shelf()


def of_an_object(rows: int) -> Tensor:
    return _SHELF.of_its_own(rows)


def of_a_class(rows: int) -> Tensor:
    return Shelf.of_the_class(rows)


def late_of_a_class(rows: int) -> Tensor:
    return Shelf.added_to_the_class(rows)


def static_of_a_class(rows: int) -> Tensor:
    return Shelf.static(rows)


WAYS: tuple[Callable[[int], Tensor], ...] = (
    in_a_dict,
    in_a_global,
    on_the_function,
    of_the_thread,
    of_the_context,
    remembered,
    of_a_pair,
    decorated,
    of_an_object,
    of_a_class,
    late_of_a_class,
    static_of_a_class,
)
