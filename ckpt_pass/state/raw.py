"""What containers hold, whatever their class makes of it when they are read.

A subclass may give other things than it holds: ``ACT2FN`` of transformers is an ``OrderedDict`` of
classes whose ``[]`` makes an instance.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Any


def mapping_class(mapping: dict[Any, Any]) -> type[dict[Any, Any]]:
    """The class whose methods do nothing but hold."""
    return OrderedDict if isinstance(mapping, OrderedDict) else dict


def entries_of(mapping: dict[Any, Any]) -> dict[Any, Any]:
    """The entries of a dict, in its order."""
    return dict(mapping_class(mapping).items(mapping))


def items_of(values: Iterable[Any]) -> list[Any]:
    """The items of a sequence or set, the keys of a dict; of anything else what it gives."""
    if isinstance(values, list):
        return list(list.__iter__(values))
    if isinstance(values, dict):
        return list(mapping_class(values).keys(values))
    if isinstance(values, deque):
        return list(deque.__iter__(values))
    if isinstance(values, set):
        return list(set.__iter__(values))
    return list(values)
