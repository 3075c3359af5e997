"""Places outside of a model that its code leads to, whatever file they are in.

A function keeps a table in a dict of its own file, a class one for all its objects, a value is
remembered under ``functools.cache``. What a run on stand-ins leaves there would be found by the
user's next step. These places are put back only: no tensor in them is replaced. What they were
given that is code, or says that something is loaded, stays.
"""

from __future__ import annotations

import functools
import gc
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ckpt_pass._torch import autograd
from ckpt_pass.state.code_names import (
    CODE,
    MEMO,
    attributes_in,
    contents_of,
    functions_in,
    globals_of,
    is_users_name,
    is_users_space,
    stored_in,
)
from ckpt_pass.state.holders import Holder, Names
from ckpt_pass.state.objects import Keeper, keeper_for
from ckpt_pass.state.spots import slots_of

#: What a call runs, whatever name it has.
_CALLED = ("forward", "__call__", "__init__", "__getitem__", "__getattr__")
_CONTAINERS = (dict, list, deque, set)
#: How far containers and objects are looked into, from what code names.
_DEPTH = 4
#: More of a container's values are data, or a registry.
_MOST_VALUES = 1000

#: A library that was loaded at first use stays: it may not be loaded twice.
_LOADED = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type, bool)


class Elsewhere:
    """What is in the places that some modules' and functions' code leads to.

    Args:
        values: modules, functions, objects of the user's own classes.
        is_known: whether a place is kept by somebody else.
    """

    def __init__(self, values: Iterable[Any], is_known: Callable[[Any], bool]) -> None:
        self._is_known = is_known
        self._names: dict[tuple[int, str], Names] = {}
        self._holders: list[Holder] = []
        self._looked_into: dict[int, Any] = {}
        self._objects: list[tuple[Any, Keeper, Any]] = []
        self._memos: dict[int, tuple[Any, int]] = {}
        self._codes: set[types.CodeType] = set()
        self._classes: set[type] = set()
        self._attributes: set[str] = set(_CALLED)
        #: Methods and attributes of what was reached, by the names that nobody has named so far.
        self._waiting: dict[str, list[tuple[Any, int]]] = {}
        self._spaces: set[int] = set()
        self._todo: list[tuple[Any, int]] = [(value, _DEPTH) for value in values]
        while self._todo:
            self._follow(*self._todo.pop())

    def restore(self) -> None:
        """Put back what was there, and forget what was remembered of fake tensors since."""
        holders: list[Holder | Names] = [*self._names.values(), *self._holders]
        for holder in holders:
            new = holder.new_values()
            if not new or not all(isinstance(value, _LOADED) for value in new):
                holder.restore()
        for thing, keeper, state in self._objects:
            if keeper.write is not None and not keeper.same(state, keeper.read(thing)):
                keeper.write(thing, state)
        for memo, misses in self._memos.values():
            if memo.cache_info().misses != misses and _holds_fakes(memo):
                memo.cache_clear()

    def _follow(self, value: Any, depth: int) -> None:
        if depth < 0 or isinstance(value, (torch.Tensor, str, bytes, int, float, type(None))):
            return
        if isinstance(value, MEMO):
            self._memos.setdefault(id(value), (value, value.cache_info().misses))
        for function in functions_in(value):
            self._function(function)
        if isinstance(value, (staticmethod, classmethod)):
            self._todo.append((value.__func__, depth))
        elif isinstance(value, types.MethodType):
            self._todo += [(value.__func__, depth), (value.__self__, depth)]
        elif isinstance(value, types.ModuleType):
            if is_users_space(vars(value)):
                self._space(value, vars(value), depth)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, functools.partial):
            self._todo.append((value.func, depth))
        elif (keeper := keeper_for(type(value))) is not None:
            if not self._is_known(value) and id(value) not in self._looked_into:
                self._looked_into[id(value)] = value
                self._objects.append((value, keeper, keeper.read(value)))
        elif isinstance(value, _CONTAINERS):
            self._container(value, depth)
        elif isinstance(value, tuple):
            self._todo += [(item, depth - 1) for item in value]
        elif type(value) not in CODE and is_users_name(type(value).__module__):
            self._class(type(value))
            if hasattr(value, "__dict__") and not isinstance(value, nn.Module):
                self._container(vars(value), depth)
            for name in slots_of(type(value)):
                self._name(value, name)

    def _function(self, function: types.FunctionType) -> None:
        code, space = function.__code__, function.__globals__
        if code in self._codes or not is_users_space(space):
            return
        self._codes.add(code)
        self._container(vars(function), 1)
        for name, value in globals_of(function):
            if type(value) not in CODE or name in stored_in(code):
                self._name(space, name)
            self._todo.append((value, _DEPTH))
        for cell in function.__closure__ or ():
            self._todo += [(value, _DEPTH) for value in contents_of(cell)]
        for name in attributes_in(code):
            if name not in self._attributes:
                self._attributes.add(name)
                self._todo += self._waiting.pop(name, ())

    def _space(self, owner: Any, content: Any, depth: int) -> None:
        """The names in a file's or class's namespace: those that code names are followed."""
        if id(owner) in self._spaces:
            return
        self._spaces.add(id(owner))
        for name, value in list(content.items()):
            is_code = type(value) in CODE or hasattr(type(value), "__get__")
            if not (is_code or name.startswith("__")):
                self._name(content if isinstance(content, dict) else owner, name)
            for function in functions_in(value) if isinstance(owner, type) else ():
                for new in stored_in(function.__code__):  # an object's own, or the class's
                    if new not in content:
                        self._name(owner, new)
            if name in self._attributes:
                self._todo.append((value, depth))
            else:
                self._waiting.setdefault(name, []).append((value, depth))

    def _class(self, cls: type) -> None:
        for base in cls.__mro__:
            if base not in self._classes and is_users_name(base.__module__):
                self._classes.add(base)
                self._space(base, vars(base), _DEPTH)

    def _name(self, space: Any, name: str) -> None:
        if (id(space), name) not in self._names:
            self._names[id(space), name] = Names(space, (name,))

    def _container(self, place: Any, depth: int) -> None:
        if id(place) in self._looked_into:
            return
        self._looked_into[id(place)] = place
        holder = Holder(place)
        if not self._is_known(place):
            self._holders.append(holder)
        if len(place) <= _MOST_VALUES:
            self._todo += [(value, depth - 1) for value in holder.values()]


def _holds_fakes(memo: Any) -> bool:
    """Whether a fake tensor is among what a memo remembers."""
    return any(isinstance(t, torch.Tensor) and autograd.is_fake(t) for t in _remembered(memo))


def _remembered(memo: Any) -> Iterator[Any]:
    todo, seen = [(thing, 0) for thing in gc.get_referents(memo)], {id(memo.__wrapped__)}
    while todo:
        thing, depth = todo.pop()
        if id(thing) in seen or isinstance(thing, (type, types.ModuleType, types.FunctionType)):
            continue
        seen.add(id(thing))
        yield thing
        # The links of a bounded memo are one deeper each.
        if isinstance(thing, torch.Tensor) or depth > 2 * _DEPTH:
            continue
        todo += [(inner, depth + 1) for inner in gc.get_referents(thing)]
