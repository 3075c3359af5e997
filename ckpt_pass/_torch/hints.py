"""The values that symbolic sizes are taken to have where something is chosen by them.

Those are the traced ones, or larger ones that were asked for: torch's ``mark_dynamic(...,
hint_override=)`` writes them on the ``ShapeEnv``, and so does :func:`take_sizes`. What is chosen by
a hint is no condition of the compiled code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch


def hint_of(size: torch.SymInt) -> int:
    """The value that a size is taken to have."""
    node = size.node
    asked = getattr(getattr(node, "shape_env", None), "var_to_hint_override", None)
    if asked and not asked.keys().isdisjoint(node.expr.free_symbols):
        found = _at(node.shape_env, node.expr, asked)
        if found.is_Integer:
            return int(found)
    return int(node.hint)


def take_sizes(sizes: Sequence[tuple[torch.SymInt, int]]) -> bool:
    """Have symbolic sizes taken to be others than those that were traced, if they can be.

    Args:
        sizes: of one graph's inputs, what they are in it (symbols, or what is computed of them),
            and their values.

    Returns:
        Whether a step of those sizes runs in the same graph: its conditions so far hold, and
        all of the sizes can be had. Else nothing has changed.
    """
    env: Any = next((size.node.shape_env for size, _ in sizes), None)
    if not hasattr(env, "var_to_hint_override"):
        return False
    asked = {size.node.expr: value for size, value in sizes if size.node.expr.is_Symbol}
    if not asked or any(_at(env, size.node.expr, asked) != value for size, value in sizes):
        return False
    ranges = env.var_to_range
    if any(symbol in ranges and value not in ranges[symbol] for symbol, value in asked.items()):
        return False
    if any(_at(env, guard.expr, asked) == sympy.false for guard in env.guards):
        return False
    env.var_to_hint_override.update(asked)
    return True


def _at(env: Any, expression: Any, asked: Mapping[sympy.Symbol, int]) -> Any:
    """An expression at sizes that were asked for, and as traced otherwise."""
    # The older name is torch 2.11's.
    traced = getattr(env, "backed_var_to_val", None) or env.var_to_val
    values = {symbol: sympy.sympify(value) for symbol, value in {**traced, **asked}.items()}
    return env.replace(expression).xreplace(values)
