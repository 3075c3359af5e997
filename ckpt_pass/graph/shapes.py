"""Sizes that a plan leaves open: which they are, its peak at given ones, where a budget holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy

from ckpt_pass._errors import CkptPassError, nearest
from ckpt_pass.policy.sites import Bytes

#: Where the search for the largest size that fits gives up: no tensor has a dimension of 2^40.
_NO_LIMIT = 1 << 40


class SizeError(CkptPassError):
    """Sizes that a plan's peak cannot be evaluated at: missing, unknown, or out of range."""


@dataclass(frozen=True, slots=True)
class Dimension:
    """A size that was left symbolic.

    Attributes:
        symbol: its name in expressions, such as ``s27``.
        places: the inputs that have it, such as ``argument 0 dim 1``; torch gives sizes that are
            equal in the traced inputs one symbol.
        traced: its value in the traced inputs.
        least, most: the range that the graph is valid for, as torch found it; ``None`` for no
            limit. torch compiles sizes of 0 and 1 apart.
    """

    symbol: str
    places: tuple[str, ...]
    traced: int
    least: int
    most: int | None

    def __str__(self) -> str:
        return f"{self.symbol} ({', '.join(self.places)})" if self.places else self.symbol


def bytes_at(expression: Bytes, dimensions: Sequence[Dimension], sizes: Mapping[str, int]) -> int:
    """Bytes at given sizes.

    Args:
        expression: a number or an expression in the symbols.
        dimensions: the symbols, and the names that go for them.
        sizes: for each symbol that the expression has, its value, by the symbol's name or by the
            place of an input's dimension.

    Raises:
        SizeError: a symbol has no value, a name is unknown, two values are given for one
            symbol, or a value is out of the range that the graph is valid for.
    """
    values = _bound(dimensions, sizes)
    if not isinstance(expression, sympy.Expr):
        return int(expression)
    missing = {str(symbol) for symbol in expression.free_symbols} - values.keys()
    if missing:
        known = {d.symbol: str(d) for d in dimensions if d.symbol in missing}
        names = ", ".join([*known.values(), *sorted(missing - known.keys())])
        raise SizeError(
            f"The peak depends on {names}, and no size is given for it; got {dict(sizes)!r}. "
            "Give every size, by symbol or by place."
        )
    return at_sizes(expression, values)


def at_sizes(expression: Bytes, values: Mapping[str, int]) -> int:
    """Bytes where every symbol has a value, by its name; whether that is valid is not asked."""
    if not isinstance(expression, sympy.Expr):
        return int(expression)
    return int(
        expression.xreplace({s: sympy.Integer(values[str(s)]) for s in expression.free_symbols})
    )


def _bound(dimensions: Sequence[Dimension], sizes: Mapping[str, int]) -> dict[str, int]:
    """The value of each symbol that is named."""
    names = {place: dimension for dimension in dimensions for place in dimension.places}
    names |= {dimension.symbol: dimension for dimension in dimensions}
    found: dict[str, int] = {}
    for name, size in sizes.items():
        dimension = names.get(name)
        if dimension is None:
            open_sizes = ", ".join(names) if names else "none: this plan is for one shape"
            raise SizeError(
                f"No size is called {name!r}.{nearest(name, names)} Sizes that are open here: "
                f"{open_sizes}. To leave sizes open, plan with dynamic=True."
            )
        if found.setdefault(dimension.symbol, size) != size:
            raise SizeError(
                f"Got {found[dimension.symbol]} and {size} for {dimension}, expected one size: "
                "they were equal in the traced inputs, so that the graph has one symbol for them. "
                "Plan with inputs in which they differ."
            )
        if size < dimension.least or (dimension.most is not None and size > dimension.most):
            most = "" if dimension.most is None else f" to {dimension.most}"
            raise SizeError(
                f"Got {size} for {dimension}, expected {dimension.least}{most or ' or more'}: the "
                "graph is another one beyond that. Plan with inputs of that size."
            )
    return found


def traced_sizes(dimensions: Sequence[Dimension]) -> dict[str, int]:
    """The sizes of the inputs that were traced."""
    return {dimension.symbol: dimension.traced for dimension in dimensions}


def in_words(sizes: Mapping[str, int]) -> str:
    """Sizes for people: ``s26 = 4, s49 = 32``."""
    return ", ".join(f"{name} = {size}" for name, size in sizes.items())


def largest(
    expression: Bytes, dimensions: Sequence[Dimension], dimension: Dimension, budget_bytes: int
) -> int | None:
    """The largest size of one dimension whose bytes are within a budget, the others as traced.

    Bytes rise with every size. ``None`` where no size is too large, 0 where all are.
    """
    others = traced_sizes(dimensions)

    def fits(size: int) -> bool:
        return bytes_at(expression, dimensions, {**others, dimension.symbol: size}) <= budget_bytes

    most = _NO_LIMIT if dimension.most is None else dimension.most
    low, high = dimension.least - 1, max(dimension.traced, dimension.least)
    while high <= most and fits(high):
        low, high = high, high * 2
    if high > most:
        if fits(most):
            return None
        high = most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low if low >= dimension.least else 0


def where_within(expression: Bytes, dimensions: Sequence[Dimension], budget_bytes: int) -> str:
    """For which sizes bytes are within a budget, in words; empty where sizes are numbers."""
    if not isinstance(expression, sympy.Expr):
        return ""
    names = {str(symbol) for symbol in expression.free_symbols}
    used = [dimension for dimension in dimensions if dimension.symbol in names]
    parts = []
    for dimension in used:
        found = largest(expression, dimensions, dimension, budget_bytes)
        bound = "any size" if found is None else f"<= {found}"
        others = {d.symbol: d.traced for d in used if d is not dimension}
        where = f" where {in_words(others)}" if others else ""
        parts.append(f"{dimension.symbol} {bound}{where}")
    return "; ".join(parts)


def shape_lines(
    expression: Bytes, dimensions: Sequence[Dimension], budget_bytes: int | None
) -> list[str]:
    """Lines of a plan's summary: the open sizes, the peak in them, and where a budget holds."""
    if not isinstance(expression, sympy.Expr):
        return []
    sizes = "; ".join(f"{d} was {d.traced}" for d in dimensions)
    lines = [f"sizes        {sizes}", f"  peak       {_leading(expression, dimensions)}"]
    if budget_bytes is not None:
        lines.append(f"  holds for  {where_within(expression, dimensions, budget_bytes)}")
    return lines


def _leading(expression: sympy.Expr, dimensions: Sequence[Dimension]) -> str:
    """What the peak is near the traced sizes; moments that win elsewhere are counted."""
    if not isinstance(expression, sympy.Max):
        return f"{expression} B"
    traced = traced_sizes(dimensions)
    first = max(expression.args, key=lambda bytes_then: at_sizes(bytes_then, traced))
    more = len(expression.args) - 1
    return f"{first} B near these; {more} other expressions may be larger elsewhere"
