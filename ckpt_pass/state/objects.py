"""Objects with a state that no reference to them keeps: generators, arrays, iterators, ``environ``.

Each kind is read, compared and put back in its own way. Iterators that can be copied have copies
standing in for them; those that cannot (generators of Python, chains of iterators) can only be seen
to have moved on.
"""

from __future__ import annotations

import array
import collections
import contextvars
import copy
import ctypes
import inspect
import io
import itertools
import operator
import os
import random
import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ckpt_pass._errors import CkptPassError
from ckpt_pass.state.remembered import Remembered
from ckpt_pass.state.shown import shown_by

#: Arrays up to this size are copied; a larger one is data that a step reads.
MOST_BYTES = 1 << 16


class SpentIteratorError(CkptPassError, RuntimeError):
    """What runs twice has moved an iterator on that nothing can move back."""


@dataclass(frozen=True, slots=True)
class Keeper:
    """How the state of objects of one class is kept.

    Attributes:
        read: the state as a value of its own.
        same: whether two states are the same.
        write: gives an object a state back; ``None`` where nothing can.
        copy: makes an object of a state, to stand in for the one that cannot be written to.
    """

    read: Callable[[Any], Any]
    same: Callable[[Any, Any], bool] = lambda a, b: bool(a == b)
    write: Callable[[Any, Any], None] | None = None
    copy: Callable[[Any], Any] | None = None


def global_generators() -> tuple[Any, ...]:
    """Python's random generator, and numpy's where numpy is imported."""
    numpy = sys.modules.get("numpy")
    found = () if numpy is None else (numpy.random.mtrand._rand,)
    return (_PYTHONS, *found)


def generators_behind(value: Any, names: tuple[str, ...]) -> Iterator[Any]:
    """The random generators behind a module or function that code names; also ``os.environ``.

    Args:
        value: what a global name stands for.
        names: what else the code names: ``np.random.rand`` names ``random``.
    """
    if isinstance(value, types.ModuleType):
        if value is random:
            yield _PYTHONS
        elif value is os and not _READ_ENVIRON.isdisjoint(names):
            yield os.environ
        elif value.__name__ == "numpy.random" or (value.__name__ == "numpy" and "random" in names):
            yield sys.modules["numpy"].random.mtrand._rand
    elif value is os.getenv:
        yield os.environ
    elif (
        isinstance(value, types.BuiltinFunctionType)
        and keeper_for(type(value.__self__)) is not None
    ):
        yield value.__self__


#: What the functions of ``random`` are methods of.
_PYTHONS: random.Random = random.seed.__self__  # type: ignore[attr-defined]


def _state_of_torchs(generator: torch.Generator) -> bytes:
    # No tensor: every run of a region reads it, used or not, and holds it until the backward.
    return generator.get_state().numpy().tobytes()


def _set_torchs(generator: torch.Generator, state: bytes) -> None:
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


def _contents(values: Any) -> bytes | None:
    kept = values.nbytes <= MOST_BYTES and not values.dtype.hasobject
    return values.tobytes() if kept else None


def _fill(values: Any, contents: bytes | None) -> None:
    if contents is not None and values.nbytes == len(contents):
        numpy = sys.modules["numpy"]
        numpy.copyto(values, numpy.frombuffer(contents, values.dtype).reshape(values.shape))


def _replace(sequence: Any, contents: Any) -> None:
    sequence[:] = contents


def _where(iterator: Any) -> list[int]:
    """Where an iterator is, and those that it reads from."""
    if isinstance(iterator, types.GeneratorType):
        frame = iterator.gi_frame
        at = -1 if frame is None else frame.f_lasti
        return [at, *_numbers(tuple(inspect.getgeneratorlocals(iterator).values()))]
    if isinstance(iterator, _OF_DICTS):
        return [operator.length_hint(iterator)]
    if isinstance(iterator, _OF_ORDERED):
        return [operator.length_hint(copy.copy(iterator))]
    try:
        return _numbers(iterator.__reduce__())
    except TypeError:  # it does not say: where those are that it reads from
        return _numbers(tuple(i for i in shown_by(iterator) if isinstance(i, _ITERATORS)))


def _numbers(position: Any) -> list[int]:
    """The numbers of a position, and who its objects are; only iterators are looked into."""
    if isinstance(position, tuple):
        return [number for part in position for number in _numbers(part)]
    if isinstance(position, _ITERATORS):
        return _where(position)
    if isinstance(position, range):  # from Python 3.12 on what is left of it is a new one
        return [position.start, position.stop, position.step]
    return [position if isinstance(position, int) else id(position)]


def _plain(state: Any) -> Any:
    """The state of a generator of numpy's as values that compare."""
    if isinstance(state, dict):
        return [(name, _plain(value)) for name, value in state.items()]
    return state.tobytes() if hasattr(state, "tobytes") else state


def _environment(environ: Any) -> dict[Any, Any]:
    return dict(environ._data)  # encoded, as it is kept: a copy decodes each


def _set_environment(environ: Any, was: dict[Any, Any]) -> None:
    now = environ._data
    for key in [key for key in now if key not in was]:
        del environ[environ.decodekey(key)]
    for key, value in was.items():
        if now.get(key) != value:
            environ[environ.decodekey(key)] = environ.decodevalue(value)


#: The functions of ``os`` that read the environment, and the environment.
_READ_ENVIRON = frozenset(("environ", "environb", "getenv", "getenvb"))


def _position(file: Any) -> Any:
    """Where a file is that is read; what one in memory holds, too."""
    try:
        if not file.readable():
            return None
        small = isinstance(file, (io.StringIO, io.BytesIO)) and file.seekable()
        return file.tell(), file.getvalue() if small else None
    except (OSError, ValueError):  # closed, a pipe, or under iteration
        return None


def _set_position(file: Any, position: Any) -> None:
    if position is not None:
        place, value = position
        if value is not None:
            file.seek(0)
            file.truncate()
            file.write(value)
        file.seek(place)


def _memory(view: memoryview) -> bytes | None:
    return view.tobytes() if view.nbytes <= MOST_BYTES and not view.readonly else None


def _fill_memory(view: memoryview, contents: bytes | None) -> None:
    if contents is not None:
        view.cast("B")[:] = contents


def _raw(value: Any) -> bytes | None:
    return bytes(value) if ctypes.sizeof(value) <= MOST_BYTES else None


def _set_raw(value: Any, contents: bytes | None) -> None:
    if contents is not None:
        ctypes.memmove(ctypes.addressof(value), contents, len(contents))


def _fields(local: threading.local) -> dict[str, Any]:
    return dict(vars(local))


def _same_fields(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(one[name] is other[name] for name in one)


def _set_fields(local: threading.local, fields: dict[str, Any]) -> None:
    own = vars(local)
    own.clear()
    own.update(fields)


def _set_variable(variable: contextvars.ContextVar[Any], value: Any) -> None:
    if value is _UNSET:  # a variable that was set cannot be unset, but may have a default
        try:
            value = contextvars.Context().run(variable.get)
        except LookupError:
            return
    variable.set(value)


_UNSET = object()
_TORCHS = Keeper(_state_of_torchs, write=_set_torchs)
_RANDOM = Keeper(lambda g: g.getstate(), write=lambda g, state: g.setstate(state))
_BYTES = Keeper(bytes, write=_replace)
_ARRAY = Keeper(lambda a: a[:], write=_replace)
_NUMPYS = Keeper(_contents, write=_fill)
_COPIED = Keeper(copy.copy, lambda a, b: _where(a) == _where(b), copy=copy.copy)
#: Their copies are iterators over lists of what is left.
_COPIED_AS_LISTS = Keeper(
    copy.copy, lambda a, b: operator.length_hint(a) == operator.length_hint(b), copy=copy.copy
)
_SEEN = Keeper(_where)
# By the thread that asks: a backward may run in another one than its forward.
_OF_THREADS = Keeper(_fields, _same_fields, _set_fields)
_FILE = Keeper(_position, write=_set_position)
_MEMORY = Keeper(_memory, write=_fill_memory)
_RAW = Keeper(_raw, write=_set_raw)
_ENVIRON = Keeper(_environment, write=_set_environment)
_OF_CONTEXTS = Keeper(lambda v: v.get(_UNSET), operator.is_, _set_variable)

_SEQUENCES: tuple[Any, ...] = ([], (), range(0), range(1 << 70), "", b"")
_GROUPS: tuple[Any, ...] = (set(), collections.deque())
_ROWS: tuple[Any, ...] = ([], (), range(0), collections.deque())
#: Iterators whose copies share nothing that moves.
_COPYABLE: tuple[type, ...] = (
    itertools.count,
    *(type(iter(values)) for values in _SEQUENCES),
    *(type(iter(group)) for group in _GROUPS),
    *(type(reversed(row)) for row in _ROWS),
)
_EMPTY: dict[Any, Any] = {}
_OF_DICTS: tuple[type, ...] = tuple(
    type(turned(values))
    for values in (_EMPTY, _EMPTY.values(), _EMPTY.items())
    for turned in (iter, reversed)
)
#: Of ordered dicts, over keys, values or items.
_OF_ORDERED: tuple[type, ...] = (type(iter(collections.OrderedDict())),)
#: Others: what they read from is shared with their copies.
_OTHERS: tuple[type, ...] = (
    *(types.GeneratorType, enumerate, zip, map, filter, *_OF_DICTS),
    *(kind for kind in vars(itertools).values() if hasattr(kind, "__next__")),
)
_ITERATORS = (*_COPYABLE, *_OF_ORDERED, *_OTHERS)
_OF_C: tuple[type, ...] = tuple(
    base.__mro__[-2] for base in (ctypes.c_int, ctypes.Structure, ctypes.Union, ctypes.Array)
)
_KINDS: tuple[tuple[tuple[type, ...], Keeper], ...] = (
    ((torch.Generator,), _TORCHS),
    ((bytearray,), _BYTES),
    ((array.array,), _ARRAY),
    ((threading.local,), _OF_THREADS),
    ((contextvars.ContextVar,), _OF_CONTEXTS),
    ((type(os.environ),), _ENVIRON),
    ((io.IOBase,), _FILE),
    ((memoryview,), _MEMORY),
    (_OF_C, _RAW),
    (_COPYABLE, _COPIED),
    (_OF_ORDERED, _COPIED_AS_LISTS),
    (_OTHERS, _SEEN),
)


def _find_keeper(cls: type) -> Keeper | None:
    for classes, keeper in _KINDS:
        if issubclass(cls, classes):
            return keeper
    if issubclass(cls, random.Random) and not issubclass(cls, random.SystemRandom):
        return _RANDOM
    if cls.__module__.partition(".")[0] == "numpy":
        return _of_numpy(cls, sys.modules["numpy"])
    return None


def _of_numpy(cls: type, numpy: Any) -> Keeper | None:
    if issubclass(cls, numpy.ndarray):
        return _NUMPYS
    if issubclass(cls, numpy.random.RandomState):
        return Keeper(_legacy_state, _same_plain, lambda g, state: g.set_state(state))
    if issubclass(cls, numpy.random.Generator):
        return _by_bit_generator(lambda generator: generator.bit_generator)
    if issubclass(cls, numpy.random.BitGenerator):
        return _by_bit_generator(lambda generator: generator)
    return None


def _legacy_state(generator: Any) -> Any:
    return generator.get_state(legacy=False)


def _same_plain(one: Any, other: Any) -> bool:
    return bool(_plain(one) == _plain(other))


def _by_bit_generator(of: Callable[[Any], Any]) -> Keeper:
    def write(generator: Any, state: Any) -> None:
        of(generator).state = state

    return Keeper(lambda generator: of(generator).state, _same_plain, write)


def held_inside(value: Any) -> tuple[Any, ...]:
    """What an object with a state of its own holds, which may have a state, too."""
    if isinstance(value, threading.local):
        return tuple(vars(value).values())
    if isinstance(value, contextvars.ContextVar):
        return (value.get(None),)
    if isinstance(value, _ITERATORS):
        return shown_by(value)
    return ()


#: How the state of a class's objects is kept; ``None`` where they have none of these.
keeper_for: Callable[[type], Keeper | None] = Remembered(_find_keeper)
