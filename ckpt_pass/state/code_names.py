"""What the code of functions reads besides their own variables: globals, closures, generators."""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ckpt_pass.state.objects import generators_behind
from ckpt_pass.state.shown import owner_of
from ckpt_pass.state.spots import MISSING

FUNCTION = types.FunctionType
#: What a name mostly stands for: code.
CODE = frozenset((type, types.ModuleType, types.BuiltinFunctionType, FUNCTION))
_GLOBAL_OPS = frozenset(("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL"))
_STORE_OPS = frozenset(("STORE_ATTR", "STORE_GLOBAL"))
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
        generators: the random generators that they draw from by a module's functions.
        cells: variables of their closures.
        defaults: values of their parameters that are made once, and kept from call to call.
        functions: themselves; they have attributes, too.
    """

    names: tuple[tuple[Any, str], ...]
    generators: tuple[Any, ...]
    cells: tuple[types.CellType, ...]
    defaults: tuple[Any, ...]
    functions: tuple[types.FunctionType, ...]


def reads_of(functions: Iterable[types.FunctionType]) -> Reads:
    """What functions read, those included that they call in their file or close over."""
    names: dict[tuple[int, str], tuple[Any, str]] = {}
    generators: dict[int, Any] = {}
    cells: dict[int, types.CellType] = {}
    defaults: dict[int, Any] = {}
    users = [fn for fn in _reached(functions) if is_users_space(fn.__globals__)]
    for fn in users:
        for name, value in _globals_of(fn):
            found = generators_behind(value, fn.__code__.co_names)
            generators.update((id(generator), generator) for generator in found)
            for space, inner in _places(fn, name, value):
                names[id(space), inner] = (space, inner)
        cells.update((id(cell), cell) for cell in _state_cells(fn))
        kept = (*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values())
        defaults.update(
            (id(v), v) for v in kept if not (_is_code(v) or isinstance(v, (str, int, float)))
        )
    return Reads(
        tuple(names.values()),
        tuple(generators.values()),
        tuple(cells.values()),
        tuple(defaults.values()),
        tuple(users),
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
    elif type(value) is _CACHED:
        yield from functions_in(value.__wrapped__)


def _is_code(value: Any) -> bool:
    """Whether a value is code that holds no state."""
    return isinstance(value, _FIXED) and not _is_bound(value)


def _may_hold(value: Any) -> bool:
    return type(value) not in CODE or _is_bound(value)


def _is_bound(value: Any) -> bool:
    """Whether a value is a method of C code such as ``stack.pop``, which leads to a list."""
    return isinstance(value, types.BuiltinFunctionType) and owner_of(value) is not None


_CACHED = type(functools.cache(int))


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
        for _, value in _globals_of(fn):
            todo += (f for f in functions_in(value) if f.__globals__ is fn.__globals__)
        for cell in fn.__closure__ or ():
            for value in contents_of(cell):
                todo += functions_in(value)


def _globals_of(fn: types.FunctionType) -> Iterator[tuple[str, Any]]:
    code = fn.__code__
    for name in _globals_in(code):
        missing = MISSING if name in stored_in(code) else FUNCTION
        yield name, fn.__globals__.get(name, missing)
    for name in _imports_in(code):
        if name in sys.modules:
            yield name, sys.modules[name]


def _places(fn: types.FunctionType, name: str, value: Any) -> Iterator[tuple[Any, str]]:
    """Where a global that a function names holds state: itself, or the attributes it has."""
    if isinstance(value, type):
        yield from _of_class(value)
        yield from _of_class(type(value))
        if is_users_name(value.__module__):
            yield from ((value, new) for new in stored_in(fn.__code__) if not hasattr(value, new))
    elif isinstance(value, types.ModuleType):
        own = vars(value)
        if is_users_space(own):
            names = _attributes_in(fn.__code__)
            yield from ((own, inner) for inner in names if _may_hold(own.get(inner)))
            yield from ((own, new) for new in stored_in(fn.__code__) if new not in own)
    elif _may_hold(value) or value.__name__ != name:  # `act = torch.sin` may be set anew
        yield fn.__globals__, name


def _of_class(cls: type) -> Iterator[tuple[Any, str]]:
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
def _attributes_in(code: types.CodeType) -> tuple[str, ...]:
    """The attributes that a function's code names, and that of the functions that it makes."""
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return tuple(dict.fromkeys([*code.co_names, *(n for c in inner for n in _attributes_in(c))]))


@functools.lru_cache(maxsize=4096)
def _globals_in(code: types.CodeType) -> tuple[str, ...]:
    """The globals that a function's code reads, and that of the functions that it makes."""
    own = [i.argval for i in dis.get_instructions(code) if i.opname in _GLOBAL_OPS]
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return tuple(dict.fromkeys([*own, *(name for c in inner for name in _globals_in(c))]))


@functools.lru_cache(maxsize=4096)
def stored_in(code: types.CodeType) -> frozenset[str]:
    """The attributes and globals that a function's code writes, and what it may give setattr."""
    found = {i.argval for i in dis.get_instructions(code) if i.opname in _STORE_OPS}
    if "setattr" in code.co_names:
        found |= {c for c in code.co_consts if isinstance(c, str) and c.isidentifier()}
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return frozenset(found.union(*map(stored_in, inner)))


@functools.lru_cache(maxsize=4096)
def _imports_in(code: types.CodeType) -> tuple[str, ...]:
    """The modules that a function imports each time it runs."""
    own = [i.argval for i in dis.get_instructions(code) if i.opname == "IMPORT_NAME"]
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return tuple(dict.fromkeys([*own, *(name for c in inner for name in _imports_in(c))]))
