"""What a model and its arguments hold: every place that running them may change.

A *holder* is such a place: a dict, a list, a deque, a set, the attributes of an object, a closure's
cell, a global that counts. Holders are found from the modules, by way of their attributes
(parameters, buffers, hooks, submodules, the training flag and whatever else is there), containers
in these, functions' closures, objects of the user's own classes, and what FSDP keeps of modules.
Random generators, arrays and iterators have their states noted, those that a module's code names as
globals too. Other objects of torch's and of Python's own library are not looked into, nor are other
globals and what a ``functools.cache`` keeps.
"""

from __future__ import annotations

import functools
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ckpt_pass._errors import CkptPassError
from ckpt_pass.state.code_names import functions_in, is_users_space, reads_of
from ckpt_pass.state.objects import Keeper, held_inside, keeper_for
from ckpt_pass.state.raw import items_of, mapping_class
from ckpt_pass.state.shown import SHOWING, shown_by
from ckpt_pass.state.spots import read_spot, slots_of, write_spot

Replace = Callable[[Any], Any]

_PLAIN = (str, bytes, int, float, complex, type(None), type, types.ModuleType)
_OBJECTS_OF = frozenset(sys.stdlib_module_names) | {"torch", "sympy", "numpy"}
#: Torch's objects that keep a model's own tensors, or what running the model changes.
_STATES_OF = ("torch.distributed.fsdp._fully_shard.",)


class Holder:
    """One place, with what it held when it was found.

    Args:
        place: a dict, list, deque, set or cell.
    """

    def __init__(self, place: Any) -> None:
        self.place = place
        self._before = self._content()

    def _content(self) -> list[Any]:
        place = self.place
        if isinstance(place, dict):
            return list(mapping_class(place).items(place))
        if isinstance(place, types.CellType):
            return [place.cell_contents] if _is_filled(place) else []
        return items_of(place)

    def values(self) -> Iterator[Any]:
        """What it held when it was found."""
        yield from (pair[1] for pair in self._before) if self._is_dict else self._before

    @property
    def _is_dict(self) -> bool:
        return isinstance(self.place, dict)

    def new_values(self) -> list[Any]:
        """What it holds now, and did not when it was found."""
        had = set(map(id, self.values()))
        now = self._content()
        found = [pair[1] for pair in now] if self._is_dict else now
        return [value for value in found if id(value) not in had]

    def restore(self) -> None:
        """Put back what it held, the very same objects in the same order."""
        now = self._content()
        if _identical(now, self._before):
            return
        place, before = self.place, self._before
        if isinstance(place, dict):
            kind = mapping_class(place)
            kind.clear(place)
            for key, value in before:
                kind.__setitem__(place, key, value)
        elif isinstance(place, types.CellType):
            if before:
                place.cell_contents = before[0]
            else:
                del place.cell_contents
        elif isinstance(place, set):
            set.clear(place)
            set.update(place, before)
        else:
            sequence: Any = list if isinstance(place, list) else deque
            sequence.clear(place)
            sequence.extend(place, before)

    def replace(self, replace: Replace) -> None:
        """Put other tensors in the place of the tensors, those in tuples among them."""
        place = self.place
        if isinstance(place, dict):
            for key, value in self._before:
                other = replaced(value, replace)
                if other is not value:
                    mapping_class(place).__setitem__(place, key, other)
        elif isinstance(place, types.CellType):
            if self._before:
                other = replaced(self._before[0], replace)
                if other is not self._before[0]:
                    place.cell_contents = other
        elif not isinstance(place, set):
            sequence: Any = list if isinstance(place, list) else deque
            for index, value in enumerate(self._before):
                other = replaced(value, replace)
                if other is not value:
                    sequence.__setitem__(place, index, other)


class Names:
    """Single names in a namespace: the slots of an object, globals; as a :class:`Holder`."""

    def __init__(self, space: Any, names: Iterable[str]) -> None:
        self._space = space
        self._before = {name: read_spot(space, name) for name in names}

    def values(self) -> Iterator[Any]:
        """What they held when they were found."""
        yield from self._before.values()

    def new_values(self) -> list[Any]:
        """What they hold now, and did not when they were found."""
        now = ((read_spot(self._space, name), old) for name, old in self._before.items())
        return [value for value, old in now if value is not old]

    def restore(self) -> None:
        """Put back what they held."""
        for name, value in self._before.items():
            if read_spot(self._space, name) is not value:
                write_spot(self._space, name, value)

    def replace(self, replace: Replace) -> None:
        """Put other tensors in the place of the tensors."""
        for name, value in self._before.items():
            other = replaced(value, replace)
            if other is not value:
                write_spot(self._space, name, other)


def _identical(now: list[Any], before: list[Any]) -> bool:
    """Whether two contents are the same objects; the pairs of a dict are made anew each time."""
    if len(now) != len(before):
        return False
    for one, other in zip(now, before, strict=True):
        same = one is other
        if not same and isinstance(one, tuple) and isinstance(other, tuple):
            same = len(one) == len(other) == 2 and one[0] is other[0] and one[1] is other[1]
        if not same:
            return False
    return True


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  (an empty cell raises)
    except ValueError:
        return False
    return True


def replaced(value: Any, replace: Replace) -> Any:
    """The stand-in of a tensor or iterator, a tuple with those in it, or the value itself."""
    if isinstance(value, torch.Tensor) or copies_stand_in(value):
        return replace(value)
    if isinstance(value, tuple):
        items = [replaced(item, replace) for item in value]
        if any(new is not old for new, old in zip(items, value, strict=True)):
            named = hasattr(type(value), "_fields")
            return type(value)(*items) if named else type(value)(items)
    return value


def copies_stand_in(value: Any) -> bool:
    """Whether a value is an iterator that only copies of it can be set back for."""
    keeper = keeper_for(type(value))
    return keeper is not None and keeper.copy is not None


class UninitializedParameterError(CkptPassError, ValueError):
    """A parameter has no shape yet: its module finds it out when it first runs."""


class Reached:
    """Everything that is reached from some values.

    Raises:
        UninitializedParameterError: a tensor among it is none yet (``nn.LazyLinear``).

    Attributes:
        holders: each place once.
        tensors: each tensor once.
        objects: those with a state of their own: how it is kept, and what it was.
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        self.holders: list[Holder | Names] = []
        self.tensors: list[torch.Tensor] = []
        self.objects: list[tuple[Any, Keeper, Any]] = []
        self._seen: dict[int, Any] = {}
        self._roots = list(roots)
        stack = list(self._roots)
        while stack:
            value = stack.pop()
            if isinstance(value, _PLAIN) or id(value) in self._seen:
                continue
            self._seen[id(value)] = value  # kept, so that no other object gets this id
            stack.extend(self._inside(value))

    @property
    def with_code(self) -> Iterator[Any]:
        """What code belongs to: modules, functions, objects of the user's own classes."""
        containers = (torch.Tensor, dict, list, deque, set, tuple, types.CellType)
        return (v for v in self._seen.values() if not isinstance(v, containers))

    def is_kept(self, place: Any) -> bool:
        """Whether a place was reached, so that somebody puts it back."""
        return id(place) in self._seen

    def _inside(self, value: Any) -> Iterator[Any]:
        if isinstance(value, torch.Tensor):
            if is_lazy(value):
                raise _uninitialized(value, self._roots)
            self.tensors.append(value)
            yield vars(value)
        elif (keeper := keeper_for(type(value))) is not None:
            self.objects.append((value, keeper, keeper.read(value)))
            yield from held_inside(value)
            return
        elif isinstance(value, SHOWING):
            yield from shown_by(value)
            return
        elif isinstance(value, (dict, list, deque, set, types.CellType)):
            place = Holder(value)
            self.holders.append(place)
            yield from place.values()
        elif isinstance(value, (tuple, frozenset)):
            yield from value
        elif isinstance(value, types.MethodType):
            yield from (value.__self__, value.__func__)
        elif isinstance(value, types.FunctionType):
            yield from value.__closure__ or ()
            yield from (value.__defaults__, value.__kwdefaults__, vars(value))
        elif isinstance(value, functools.partial):
            yield from (value.func, value.args, value.keywords)
        if isinstance(value, nn.Module):
            yield from self._named_by(type(value))
        if isinstance(value, torch.jit.ScriptModule):  # it keeps them where Python sees no place
            yield from (*value.parameters(), *value.buffers())
        if _is_open(value):
            yield vars(value)
        names = () if isinstance(value, torch.Tensor) else slots_of(type(value))
        if names and type(value).__module__.partition(".")[0] not in _OBJECTS_OF:
            holder = Names(value, names)
            self.holders.append(holder)
            yield from holder.values()

    def _named_by(self, cls: type) -> Iterator[Any]:
        """What counts or draws among the globals that a class of modules names."""
        if id(cls) in self._seen or cls.__module__.partition(".")[0] in _OBJECTS_OF:
            return
        self._seen[id(cls)] = cls
        functions = (
            f for base in cls.__mro__ for v in vars(base).values() for f in functions_in(v)
        )
        reads = reads_of(fn for fn in functions if is_users_space(fn.__globals__))
        yield from (*reads.generators, *reads.defaults, *reads.cells)
        for space, name in reads.names:
            value = read_spot(space, name)
            if type(value) in (int, float):
                self.holders.append(Names(space, [name]))
            elif keeper_for(type(value)) is not None:
                yield value


def _uninitialized(tensor: torch.Tensor, roots: list[Any]) -> UninitializedParameterError:
    modules = [root for root in roots if isinstance(root, nn.Module)]
    owned = [pair for m in modules for pair in (*m.named_parameters(), *m.named_buffers())]
    name = next((name for name, value in owned if value is tensor), "a tensor")
    return UninitializedParameterError(
        f"{name} has no shape yet (a {type(tensor).__name__}, of a lazy module such as "
        "nn.LazyLinear). Expected a model whose parameters are there: run it once on a batch, "
        "model(*args) under torch.no_grad(), and then ask again."
    )


def _is_open(value: Any) -> bool:
    """Whether a value is an object whose attributes are to be looked at."""
    if isinstance(value, (torch.Tensor, types.FunctionType, types.MethodType, torch.Generator)):
        return False
    if not hasattr(value, "__dict__"):
        return False
    container = isinstance(value, (nn.Module, dict, list, deque, set, types.SimpleNamespace))
    module = type(value).__module__
    return container or module.startswith(_STATES_OF) or module.partition(".")[0] not in _OBJECTS_OF
