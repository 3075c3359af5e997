"""Rows of an integer program: sums of variables that stay within bounds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

#: A sum: variable -> factor, and the constant part under -1.
Sum = dict[int, float]
CONSTANT = -1


class Rows:
    """Variables and rows, in the order in which they were asked for.

    Attributes:
        upper, integer: of each variable; all are at least 0.
        rows: (sum, bound): the sum is at most the bound.
    """

    def __init__(self) -> None:
        self.upper: list[float] = []
        self.integer: list[bool] = []
        self.rows: list[tuple[Sum, float]] = []

    def _variable(self, upper: float = 1.0, *, integer: bool = False) -> int:
        self.upper.append(upper)
        self.integer.append(integer)
        return len(self.upper) - 1

    def _at_most(self, terms: Iterable[tuple[int | None, float]], bound: float) -> None:
        """Sum of (variable, factor) <= bound; variables that do not exist are 0."""
        total: Sum = defaultdict(float)
        for variable, factor in terms:
            if variable is not None:
                total[variable] += factor
        bound -= total.pop(CONSTANT, 0.0)
        if total or bound < 0:
            self.rows.append((total, bound))

    def _implies(self, low: int | None, *high: int | None, slack: float = 0.0) -> None:
        """low <= sum of high + slack."""
        if low is not None:
            self._at_most([(low, 1.0), *((h, -1.0) for h in high)], slack)

    def _both(self, one: int | None, other: int | None) -> int | None:
        """A variable that is 1 where two are."""
        if one is None or other is None:
            return None
        both = self._variable()
        self._at_most([(one, 1.0), (other, 1.0), (both, -1.0)], 1.0)
        return both
