"""What the code of functions reads besides their own variables: globals, closures, generators."""

from __future__ import annotations

import builtins
import dis
import functools
import sys
import types
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ckpt_pass.state.objects import generators_behind
from ckpt_pass.state.shown import owner_of
from ckpt_pass.state.spots import MISSING, Owner, space_of

FUNCTION = types.FunctionType
#: What a name mostly stands for: code.
CODE = frozenset((type, types.ModuleType, types.BuiltinFunctionType, FUNCTION))
_GLOBAL_OPS = frozenset(("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL"))
_STORE_OPS = frozenset(("STORE_ATTR", "STORE_GLOBAL"))
_NAMING_OPS = _GLOBAL_OPS | _STORE_OPS | {"IMPORT_NAME"}
#: What stands for code in closures, and holds no state.
_FIXED = (type, types.ModuleType, types.BuiltinFunctionType, FUNCTION)
#: Libraries whose globals, classes and objects are no state of a step.
_LIBRARIES = frozenset({"torch", "numpy", "ckpt_pass"})


@dataclass(frozen=True, slots=True)
class Reads:
    """What some functions read.

    Attributes:
        names: globals, and attributes of classes and modules that globals name: a namespace (a
            dict or a class) and a name.
        owners: what the namespaces are found by.
        generators: the random generators that they draw from by a module's functions.
        seeds: whether they may set a random state.
        cells: variables of their closures.
        defaults: values of their parameters that are made once, and kept from call to call.
        functions: themselves; they have attributes, too.
    """

    names: tuple[tuple[Any, str], ...]
    owners: tuple[Owner, ...]
    generators: tuple[Any, ...]
    seeds: bool
    cells: tuple[types.CellType, ...]
    defaults: tuple[Any, ...]
    functions: tuple[types.FunctionType, ...]


class ReadPlaces:
    """Where the values lie that some functions read: found once, and held weakly.

    So it may be remembered of a class without keeping that alive.

    Args:
        functions: those, and so those that they call in their file or close over.
    """

    __slots__ = (
        "_functions",
        "_generators",
        "_missing",
        "_names",
        "_seeds",
        "_with_cells",
        "_with_defaults",
    )

    def __init__(self, functions: Iterable[types.FunctionType]) -> None:
        names: dict[tuple[int, str], tuple[weakref.ref[Owner], str]] = {}
        generators: list[tuple[weakref.ref[types.FunctionType], str]] = []
        users = [fn for fn in _reached(functions) if is_users_space(fn.__globals__)]
        for fn in users:
            for name, value in globals_of(fn):
                if list(generators_behind(value, fn.__code__.co_names)):
                    generators.append((weakref.ref(fn), name))
                for owner, inner in _places(fn, name, value):
                    names[id(space_of(owner)), inner] = (weakref.ref(owner), inner)
        self._names = tuple(names.values())
        self._generators = tuple(generators)
        self._seeds = any(map(_is_seeding, (n for fn in users for n in attributes_in(fn.__code__))))
        self._functions = tuple(map(weakref.ref, users))
        #: Names of what is not there yet, if it ever will be.
        self._missing = tuple((weakref.ref(fn), n) for fn in users for n in _missing_in(fn))
        self._with_cells = tuple(weakref.ref(fn) for fn in users if list(_state_cells(fn)))
        self._with_defaults = tuple(weakref.ref(fn) for fn in users if list(_kept_defaults(fn)))

    def reads(self) -> Reads | None:
        """What the functions read; ``None`` where one of them is gone, or more is there now."""
        for ref, name in self._missing:
            if (fn := ref()) is not None and _is_there(fn, name):
                return None
        functions = [fn for ref in self._functions if (fn := ref()) is not None]
        owners = [owner for ref, _ in self._names if (owner := ref()) is not None]
        if len(functions) < len(self._functions) or len(owners) < len(self._names):
            return None
        cells: dict[int, types.CellType] = {}
        for ref in self._with_cells:
            if (fn := ref()) is not None:
                cells.update((id(cell), cell) for cell in _state_cells(fn))
        defaults: dict[int, Any] = {}
        for ref in self._with_defaults:
            if (fn := ref()) is not None:
                defaults.update((id(value), value) for value in _kept_defaults(fn))
        spaces = zip(map(space_of, owners), self._names, strict=True)
        return Reads(
            tuple((space, name) for space, (_, name) in spaces),
            tuple(owners),
            tuple(self._drawn_from()) if self._generators else (),
            self._seeds,
            tuple(cells.values()),
            tuple(defaults.values()),
            tuple(functions),
        )

    def _drawn_from(self) -> Iterator[Any]:
        found: dict[int, Any] = {}
        for ref, name in self._generators:
            if (fn := ref()) is not None:
                value = fn.__globals__.get(name, sys.modules.get(name))
                behind = generators_behind(value, fn.__code__.co_names)
                found.update((id(generator), generator) for generator in behind)
        yield from found.values()


def reads_of(functions: Iterable[types.FunctionType]) -> Reads:
    """What functions read, those included that they call in their file or close over."""
    held = list(functions)
    found = ReadPlaces(held).reads()
    assert found is not None, "functions that are held are there"
    return found


#: Parts of names of functions that set random states: ``manual_seed``, ``seed_everything``,
#: ``fork_rng``, ``set_rng_state``, ``setstate`` and ``set_state``.
_SEEDING = ("seed", "rng", "setstate", "set_state")


def _is_seeding(name: str) -> bool:
    return any(part in name.lower() for part in _SEEDING)


def _missing_in(fn: types.FunctionType) -> Iterator[str]:
    names = (*_globals_in(fn.__code__), *_imports_in(fn.__code__))
    return (name for name in names if not (_is_there(fn, name) or hasattr(builtins, name)))


def _is_there(fn: types.FunctionType, name: str) -> bool:
    return name in fn.__globals__ or (name in sys.modules and name in _imports_in(fn.__code__))


def _kept_defaults(fn: types.FunctionType) -> Iterator[Any]:
    kept = (*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values())
    return (
        value for value in kept if not (_is_code(value) or isinstance(value, (str, int, float)))
    )


def functions_in(value: Any) -> Iterator[types.FunctionType]:
    """The functions that an attribute of a class, or a global, stands for."""
    if type(value) is FUNCTION:
        yield value
    elif isinstance(value, (staticmethod, classmethod)):
        yield from functions_in(value.__func__)
    elif isinstance(value, property):
        yield from (f for f in (value.fget, value.fset) if type(f) is FUNCTION)
    elif isinstance(value, functools.cached_property):
        yield from functions_in(value.func)
    elif type(value) is MEMO:
        yield from functions_in(value.__wrapped__)


def _is_code(value: Any) -> bool:
    """Whether a value is code that holds no state."""
    return isinstance(value, _FIXED) and not _is_bound(value)


def _may_hold(value: Any) -> bool:
    return type(value) not in CODE or _is_bound(value)


def _is_bound(value: Any) -> bool:
    """Whether a value is a method of C code such as ``stack.pop``, which leads to a list."""
    return isinstance(value, types.BuiltinFunctionType) and owner_of(value) is not None


#: What ``functools.cache`` and ``lru_cache`` make.
MEMO = type(functools.cache(int))


def is_users_space(space: dict[str, Any]) -> bool:
    """Whether a file's globals are of no library whose state is none of a step's."""
    return is_users_name(space.get("__name__"))


def is_users_name(module: str | None) -> bool:
    """Whether a module's name is of no library whose objects are no state of a step."""
    library = (module or "").partition(".")[0]
    known = library in _LIBRARIES or library in sys.stdlib_module_names
    return not known or library == "__main__"


def _reached(functions: Iterable[types.FunctionType]) -> Iterator[types.FunctionType]:
    """Functions, those of their files that they name, and what they close over (decorated ones)."""
    todo, seen = list(functions), set()
    while todo:
        fn = todo.pop()
        if fn in seen:
            continue
        seen.add(fn)
        yield fn
        for _, value in globals_of(fn):
            todo += (f for f in functions_in(value) if f.__globals__ is fn.__globals__)
        for cell in fn.__closure__ or ():
            for value in contents_of(cell):
                todo += functions_in(value)


def globals_of(fn: types.FunctionType) -> Iterator[tuple[str, Any]]:
    code = fn.__code__
    for name in _globals_in(code):
        missing = MISSING if name in stored_in(code) else FUNCTION
        yield name, fn.__globals__.get(name, missing)
    for name in _imports_in(code):
        if name in sys.modules:
            yield name, sys.modules[name]


def _places(fn: types.FunctionType, name: str, value: Any) -> Iterator[tuple[Owner, str]]:
    """Where a global that a function names holds state: itself, or the attributes it has.

    As what the namespace is found by, and the name in it.
    """
    if isinstance(value, type):
        yield from _of_class(value)
        yield from _of_class(type(value))
        if is_users_name(value.__module__):
            yield from ((value, new) for new in stored_in(fn.__code__) if not hasattr(value, new))
    elif isinstance(value, types.ModuleType):
        own = vars(value)
        if is_users_space(own):
            names = attributes_in(fn.__code__)
            yield from ((value, inner) for inner in names if _may_hold(own.get(inner)))
            yield from ((value, new) for new in stored_in(fn.__code__) if new not in own)
    elif _may_hold(value) or value.__name__ != name:  # `act = torch.sin` may be set anew
        yield fn, name


def _of_class(cls: type) -> Iterator[tuple[Owner, str]]:
    for base in cls.__mro__:
        if is_users_name(base.__module__):
            for name, value in vars(base).items():
                code = _is_code(value) or hasattr(type(value), "__get__")
                if not code and not name.startswith("__"):
                    yield base, name


def _state_cells(fn: types.FunctionType) -> Iterator[types.CellType]:
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        held = tuple(contents_of(cell))
        if name != "__class__" and not (held and _is_code(held[0])):
            yield cell


def contents_of(cell: types.CellType) -> Iterator[Any]:
    """What a variable of a closure holds; nothing where it is not bound yet."""
    try:
        yield cell.cell_contents
    except ValueError:
        return


@functools.lru_cache(maxsize=4096)
def attributes_in(code: types.CodeType) -> tuple[str, ...]:
    """The attributes that a function's code names, and that of the functions that it makes."""
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return tuple(dict.fromkeys([*code.co_names, *(n for c in inner for n in attributes_in(c))]))


@functools.lru_cache(maxsize=4096)
def _namings_in(code: types.CodeType) -> tuple[tuple[str, str], ...]:
    """The instructions of a function's own code that name globals, attributes it writes, modules.

    Read once for all who ask: to disassemble is what takes the time.
    """
    found = ((i.opname, i.argval) for i in dis.get_instructions(code) if i.opname in _NAMING_OPS)
    return tuple(dict.fromkeys(found))


@functools.lru_cache(maxsize=4096)
def _globals_in(code: types.CodeType) -> tuple[str, ...]:
    """The globals that a function's code reads, and that of the functions that it makes."""
    own = [name for op, name in _namings_in(code) if op in _GLOBAL_OPS]
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return tuple(dict.fromkeys([*own, *(name for c in inner for name in _globals_in(c))]))


@functools.lru_cache(maxsize=4096)
def stored_in(code: types.CodeType) -> frozenset[str]:
    """The attributes and globals that a function's code writes, and what it may give setattr."""
    found = {name for op, name in _namings_in(code) if op in _STORE_OPS}
    if "setattr" in code.co_names:
        found |= {c for c in code.co_consts if isinstance(c, str) and c.isidentifier()}
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return frozenset(found.union(*map(stored_in, inner)))


@functools.lru_cache(maxsize=4096)
def _imports_in(code: types.CodeType) -> tuple[str, ...]:
    """The modules that a function imports each time it runs."""
    own = [name for op, name in _namings_in(code) if op == "IMPORT_NAME"]
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return tuple(dict.fromkeys([*own, *(name for c in inner for name in _imports_in(c))]))
