"""Bytes as plain data: numbers, and expressions of sizes as nested lists.

Nothing is parsed or evaluated: an expression is rebuilt from a short list of functions, with
numbers and exponents of limited size.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import sympy
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod, ModularIndexing, PythonMod

from ckpt_pass.plans.schema import PlanFileError, Reader
from ckpt_pass.policy.sites import Bytes

#: The functions that byte counts are made of: sympy's, and torch's for divisions of sizes.
_FUNCTIONS: Mapping[str, Any] = MappingProxyType(
    {
        "add": sympy.Add,
        "mul": sympy.Mul,
        "max": sympy.Max,
        "min": sympy.Min,
        "floor": sympy.floor,
        "ceiling": sympy.ceiling,
        "torch_max": Max,
        "torch_min": Min,
        "floor_div": FloorDiv,
        "mod": Mod,
        "python_mod": PythonMod,
        "modular_indexing": ModularIndexing,
    }
)
_NAMES = {function: name for name, function in _FUNCTIONS.items()}
#: Sizes have few factors: higher powers come from hostile files, and would take for ever.
_MOST_EXPONENT = 16
_MOST_DEPTH = 64
_MOST_DIGITS_VALUE = 1 << 62


class InexpressibleError(TypeError):
    """A byte count made of functions that plan files do not know."""


def expression_to_data(value: Bytes) -> Any:
    """A byte count as data."""
    if isinstance(value, int):
        return value
    return _to_data(sympy.sympify(value))


def _to_data(value: sympy.Expr) -> Any:
    if value.is_Integer:
        return int(value)
    if value.is_Rational:
        return ["rational", int(value.p), int(value.q)]
    if value.is_Symbol:
        flags = [name for name in ("integer", "positive", "nonnegative") if _assumed(value, name)]
        return ["symbol", value.name, *flags]
    if value.is_Pow:
        return ["pow", _to_data(value.base), int(value.exp)]
    name = _NAMES.get(value.func)
    if name is None:
        raise InexpressibleError(f"{value.func} has no form in plan files")
    # The order of a sum's terms is sympy's own; sorted, the same plan gives the same file.
    parts = sorted((_to_data(part) for part in value.args), key=repr)
    commutes = name in ("add", "mul", "max", "min", "torch_max", "torch_min")
    return [name, *(parts if commutes else (_to_data(part) for part in value.args))]


def _assumed(symbol: sympy.Symbol, name: str) -> bool:
    """What a symbol was made with, not what follows from it."""
    return bool(symbol._assumptions_orig.get(name))


def expression_from_data(reader: Reader) -> Bytes:
    """The same back.

    Raises:
        PlanFileError: it is no byte count.
    """
    if isinstance(reader.value, int):
        return reader.whole()
    return _from_data(reader, 0)


def _from_data(reader: Reader, depth: int) -> Any:
    if depth > _MOST_DEPTH:
        raise PlanFileError(reader.where, "an expression that is not so deep", "a deeper one")
    if isinstance(reader.value, int):
        return sympy.Integer(reader.whole(-_MOST_DIGITS_VALUE))
    head, *rest = reader.items() or [reader]
    kind = head.text()
    if kind == "symbol" and rest:
        known = {name: name for name in ("integer", "positive", "nonnegative")}
        flags = {part.one_of(known): True for part in rest[1:]}
        return sympy.Symbol(rest[0].text(), **flags)
    if kind == "rational" and len(rest) == 2:
        numerator = rest[0].whole(-_MOST_DIGITS_VALUE)
        return sympy.Rational(numerator, rest[1].whole(1))
    if kind == "pow" and len(rest) == 2:
        exponent = rest[1].whole(-_MOST_EXPONENT, _MOST_EXPONENT)
        return _built(reader, sympy.Pow, _from_data(rest[0], depth + 1), exponent)
    function = head.one_of(_FUNCTIONS)
    return _built(reader, function, *(_from_data(part, depth + 1) for part in rest))


def _built(reader: Reader, function: Any, *args: Any) -> Any:
    try:
        return function(*args)
    except (TypeError, ValueError, AssertionError, ArithmeticError, RecursionError) as error:
        raise PlanFileError(reader.where, "an expression of sizes", reader.value) from error
