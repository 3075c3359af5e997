"""Copies of optimizers that share nothing with them: stepped, they leave no trace."""

from __future__ import annotations

import copy
import types
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import torch

from ckpt_pass._torch import optimizers

StandIn = Callable[[torch.Tensor], torch.Tensor]

#: What copies share: it is code, or cannot be changed.
_SHARED = (
    str, bytes, int, float, complex, bool, type(None), type, torch.dtype, torch.device, torch.Size,
    types.FunctionType, types.BuiltinFunctionType, types.ModuleType,
)  # fmt: skip


class Copier:
    """Copies objects with all that they hold, other tensors in the place of the tensors.

    What cannot be made without its class's own code (a lock, a file) is shared.

    Args:
        stand_in: makes what stands for a tensor; asked once for each.
    """

    def __init__(self, stand_in: StandIn) -> None:
        self._stand_in = stand_in
        self._made: dict[int, tuple[Any, Any]] = {}  # with what was copied, so that it keeps its id

    def __call__(self, value: Any) -> Any:
        """The copy of a value: always the same of the same."""
        if isinstance(value, _SHARED):
            return value
        if id(value) not in self._made:
            self._copy(value)
        return self._made[id(value)][1]

    def _copy(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self._note(value, self._stand_in(value))
        elif isinstance(value, tuple):
            items = [self(item) for item in value]
            named = hasattr(type(value), "_fields")
            self._note(value, type(value)(*items) if named else type(value)(items))
        elif isinstance(value, (list, deque)):
            new = self._note(value, copy.copy(value))
            new.clear()
            new.extend(self(item) for item in value)
        elif isinstance(value, (set, frozenset)):
            self._note(value, type(value)(self(item) for item in value))
        elif isinstance(value, dict):
            self._copy_dict(value)
        elif isinstance(value, types.MethodType):
            self._note(value, types.MethodType(value.__func__, self(value.__self__)))
        else:
            self._copy_object(value)

    def _note(self, value: Any, new: Any) -> Any:
        self._made[id(value)] = (value, new)
        return new

    def _copy_dict(self, value: dict[Any, Any]) -> None:
        kind = OrderedDict if isinstance(value, OrderedDict) else dict
        new = self._note(value, copy.copy(value))
        kind.clear(new)
        for key, item in value.items():
            kind.__setitem__(new, self(key), self(item))

    def _copy_object(self, value: Any) -> None:
        attributes = getattr(value, "__dict__", None)
        new = _empty(type(value)) if isinstance(attributes, dict) else None
        if new is None or not isinstance(attributes, dict):
            self._note(value, value)
            return
        self._note(value, new)
        held = _own_state(value) if isinstance(value, torch.optim.Optimizer) else attributes
        for name, item in held.items():
            new.__dict__[name] = self(item)


def _empty(cls: type) -> Any:
    """An object of a class whose constructor has not run; ``None`` where there can be none."""
    try:
        return object.__new__(cls)
    except TypeError:
        return None


def _own_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's attributes, without what a scheduler or a hook has hung on to it.

    A scheduler counts steps in a ``step`` of its own, which steps the optimizer, not a copy.
    """
    cls = type(optimizer)
    found = {}
    for name, value in vars(optimizer).items():
        if callable(value) and callable(getattr(cls, name, None)):
            continue
        found[name] = OrderedDict() if name in optimizers.HOOKS else value
    return found
