"""Read plain data of known shape; anything else is an error that says where and what."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch.utils.checkpoint import CheckpointPolicy

from ckpt_pass._errors import CkptPassError
from ckpt_pass.policy.sites import SiteContext

T = TypeVar("T")

#: Beyond any size or time that a plan can hold; what reads it stays in 64 bits.
_MOST = 1 << 62
_SHOWN = 60


class PlanFileError(CkptPassError):
    """A plan file that is damaged, hand-edited, or of another version."""

    def __init__(self, where: str, expected: str, got: object) -> None:
        shown = repr(got)
        shown = shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "..."
        super().__init__(
            f"The plan file cannot be read: {where or 'the file'} is {shown}, expected {expected}. "
            "Save the plan again with Plan.save; plan files are data that this library writes, "
            "and any change by hand is refused."
        )


class Reader:
    """One value of a plan file, and where it stands.

    Attributes:
        value: what ``json`` made of it.
        where: its place, for messages.
    """

    __slots__ = ("value", "where")

    def __init__(self, value: Any, where: str = "") -> None:
        self.value = value
        self.where = where

    def _fail(self, expected: str) -> PlanFileError:
        return PlanFileError(self.where, expected, self.value)

    def __getitem__(self, key: str) -> Reader:
        if not isinstance(self.value, dict):
            raise self._fail("an object")
        if key not in self.value:
            raise self._fail(f"an object with the key {key!r}")
        return Reader(self.value[key], f"{self.where}.{key}".lstrip("."))

    def get(self, key: str) -> Reader:
        """A member that may be missing; null then."""
        missing = isinstance(self.value, dict) and key not in self.value
        return Reader(None, f"{self.where}.{key}".lstrip(".")) if missing else self[key]

    def text(self) -> str:
        """A string."""
        if not isinstance(self.value, str):
            raise self._fail("a string")
        return self.value

    def one_of(self, known: Mapping[str, T]) -> T:
        """One of the values that are known by name."""
        if not isinstance(self.value, str) or self.value not in known:
            raise self._fail(f"one of {', '.join(sorted(known))}")
        return known[self.value]

    def whole(self, least: int = 0, most: int = _MOST) -> int:
        """A whole number in a range."""
        value = self.value
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self._fail(f"a whole number from {least} to {most}")
        return value

    def number(self, least: float = 0.0) -> float:
        """A finite number."""
        value = self.value
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not math.isfinite(value) or not least <= value <= _MOST:
            raise self._fail(f"a number from {least} on")
        return float(value)

    def flag(self) -> bool:
        """True or false."""
        if not isinstance(self.value, bool):
            raise self._fail("true or false")
        return self.value

    def items(self, length: int | None = None) -> list[Reader]:
        """The members of a list."""
        value = self.value
        if not isinstance(value, list) or (length is not None and len(value) != length):
            raise self._fail("a list" if length is None else f"a list of {length}")
        return [Reader(item, f"{self.where}[{index}]") for index, item in enumerate(value)]

    def maybe(self, read: Callable[[Reader], T]) -> T | None:
        """What ``read`` makes of it, or ``None`` for null."""
        return None if self.value is None else read(self)

    def pick(self, table: list[T]) -> T:
        """The member of a table that its number names."""
        return table[self.whole(0, len(table) - 1)] if table else self._raise("an empty table")

    def _raise(self, expected: str) -> Any:
        raise self._fail(expected)

    def texts(self) -> tuple[str, ...]:
        """A list of strings."""
        return tuple(item.text() for item in self.items())


class CodePolicy:
    """Stands for a policy that is Python code, which a plan file does not carry."""

    def __init__(self, words: str) -> None:
        self.words = words

    def __call__(self, site: SiteContext) -> CheckpointPolicy | None:
        """Not to be asked: a loaded plan replays its decisions."""
        raise PlanFileError("the policy", "one that a file can carry", self.words)

    def __repr__(self) -> str:
        return f"CodePolicy({self.words!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CodePolicy) and other.words == self.words

    def __hash__(self) -> int:
        return hash(self.words)
