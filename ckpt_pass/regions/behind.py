"""The modules behind what a region runs: itself, or in closures, arguments and objects."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

from ckpt_pass.regions.kinds import is_users
from ckpt_pass.state.code_names import FUNCTION, contents_of, reads_of
from ckpt_pass.state.spots import read_spot

_CONTAINERS = (list, tuple, dict, functools.partial, types.MethodType, FUNCTION)


def modules_behind(fn: Any, *arguments: Any) -> Iterator[nn.Module]:
    """Each of them once, the nearest first; modules inside of modules are not given."""
    if isinstance(fn, nn.Module) and not arguments:  # nearly always
        yield fn
        return
    seen: set[int] = set()
    todo: list[tuple[Any, int]] = [(fn, 0), *((argument, 0) for argument in arguments)]
    while todo:
        value, depth = todo.pop(0)
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            yield value
        elif depth < 3:
            todo += [(item, depth + 1) for item in _inside(value)]


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        yield from value
    elif isinstance(value, dict):
        yield from dict.values(value)
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, weakref.ref):
        yield value()
    elif isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, FUNCTION):
        for cell in value.__closure__ or ():
            yield from contents_of(cell)
        for space, name in reads_of([value]).names:
            if isinstance(found := read_spot(space, name), (nn.Module, *_CONTAINERS)):
                yield found
    elif is_users(type(value)) and hasattr(value, "__dict__"):
        yield from vars(value).values()
