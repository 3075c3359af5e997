"""Single names in namespaces that belong to others too: read and written."""

from __future__ import annotations

import types
from typing import Any, TypeAlias

from torch import nn

#: What a name holds that is not there.
MISSING = object()

#: What a namespace is found by: a function's globals, a module's attributes, a class. All of these
#: can be referred to weakly, which a dict cannot.
Owner: TypeAlias = types.FunctionType | types.ModuleType | type


def space_of(owner: Owner) -> Any:
    """The namespace that is found by its owner: a dict, or a class."""
    if isinstance(owner, types.FunctionType):
        return owner.__globals__
    return vars(owner) if isinstance(owner, types.ModuleType) else owner


def read_spot(space: Any, name: str) -> Any:
    """What a name in a namespace (a dict of globals, a class, an object) holds now."""
    if isinstance(space, dict):
        return space.get(name, MISSING)
    if isinstance(space, type):
        return vars(space).get(name, MISSING)
    return getattr(space, name, MISSING)


def write_spot(space: Any, name: str, value: Any) -> None:
    """Make a name in a namespace hold a value, or be gone."""
    if value is MISSING:
        if isinstance(space, dict):
            del space[name]
        else:
            delattr(space, name)
    elif isinstance(space, dict):
        space[name] = value
    elif isinstance(space, (type, nn.Module)):  # TorchScript's modules keep their attributes
        setattr(space, name, value)
    else:
        object.__setattr__(space, name, value)  # of frozen dataclasses too


def slots_of(cls: type) -> tuple[str, ...]:
    """The names of an object's fields that are in no ``__dict__``."""
    found = [name for base in cls.__mro__ for name in _names(vars(base).get("__slots__", ()))]
    return tuple(name for name in found if name not in ("__dict__", "__weakref__"))


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)
