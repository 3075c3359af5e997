"""Values that show what something else holds now: views, read-only mappings, iterators, methods.

``features.values()``, ``iter(features)`` and ``stack.pop`` hold nothing of their own: whoever has
one reads the container behind it as it is by then, or changes it.
"""

from __future__ import annotations

import collections
import gc
import types
import weakref
from typing import Any

_EMPTY: dict[Any, Any] = {}
_ORDERED: collections.OrderedDict[Any, Any] = collections.OrderedDict()
_BOUND = (types.BuiltinFunctionType, types.MethodWrapperType)
_PROXIES = (weakref.ProxyType, weakref.CallableProxyType)
_VIEWS: tuple[type, ...] = (
    types.MappingProxyType,
    *(type(m.keys()) for m in (_EMPTY, _ORDERED)),
    *(type(m.values()) for m in (_EMPTY, _ORDERED)),
    *(type(m.items()) for m in (_EMPTY, _ORDERED)),
    type(iter(int, 1)),
)
#: All of them but iterators, which have a state of their own, too.
SHOWING: tuple[type, ...] = (*_BOUND, *_PROXIES, *_VIEWS)


def shown_by(value: Any) -> tuple[Any, ...]:
    """What a view, a proxy, an iterator or a method of C code leads to."""
    if type(value) in _PROXIES:  # first: what one stands for would be asked for its class
        try:
            return (value.__repr__.__self__,)
        except ReferenceError:  # what it stood for is gone
            return ()
    if isinstance(value, _BOUND):
        owner = owner_of(value)
        return () if owner is None else (owner,)
    if isinstance(value, types.GeneratorType):
        return ()
    return tuple(thing for thing in gc.get_referents(value) if not _is_namespace(thing))


def owner_of(method: Any) -> Any:
    """What a method of C code is bound to (``stack.pop``); ``None`` for functions.

    Functions are bound to a module or class, those of extensions to a capsule.
    """
    owner = method.__self__
    is_code = isinstance(owner, (types.ModuleType, type)) or type(owner).__name__ == "PyCapsule"
    return None if is_code else owner


def _is_namespace(thing: Any) -> bool:
    """Whether a dict is that of a class, which nobody but the class may write to."""
    return isinstance(thing, type) or (type(thing) is dict and "__doc__" in thing)
