"""What the code of functions names besides their own variables: globals, random generators."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch

from ckpt_pass.state.objects import generators_behind

FUNCTION = types.FunctionType
#: What a name mostly stands for: code.
CODE = frozenset((type, types.ModuleType, types.BuiltinFunctionType, FUNCTION, torch.dtype))
_GLOBAL_OPS = frozenset(("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL"))


def names_read(fn: types.FunctionType) -> Iterator[tuple[dict[str, Any], str]]:
    """The globals that a function reads, and those that its file's functions read for it."""
    for space, name, value, _ in _named(fn):
        if type(value) not in CODE:
            yield space, name


def generators_named(fn: types.FunctionType) -> Iterator[Any]:
    """The random generators that the same code draws from by functions of ``random`` or numpy."""
    for _, _, value, names in _named(fn):
        yield from generators_behind(value, names)


def _named(
    fn: types.FunctionType,
) -> Iterator[tuple[dict[str, Any], str, Any, tuple[str, ...]]]:
    """Namespace, name, what it stands for, and the attributes that the same code names."""
    space, todo, seen = fn.__globals__, [fn.__code__], {fn.__code__}
    while todo:
        code = todo.pop()
        for name in _globals_in(code):
            value = space.get(name, FUNCTION)
            if type(value) is FUNCTION and value.__globals__ is space:
                if value.__code__ not in seen:
                    seen.add(value.__code__)
                    todo.append(value.__code__)
            else:
                yield space, name, value, code.co_names


@functools.lru_cache(maxsize=4096)
def _globals_in(code: types.CodeType) -> tuple[str, ...]:
    """The globals that a function's code reads, and that of the functions that it makes."""
    own = [i.argval for i in dis.get_instructions(code) if i.opname in _GLOBAL_OPS]
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return tuple(dict.fromkeys([*own, *(name for c in inner for name in _globals_in(c))]))
