"""Tensors that wrap others, such as DTensor: their looks, and tensors of the same looks again."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

Look: TypeAlias = Callable[[], torch.Tensor]
"""Makes a tensor of a look, without values."""


def wraps(types: Iterable[type]) -> bool:
    """Whether one of some classes of tensors wraps others."""
    return any(hasattr(kind, "__tensor_flatten__") for kind in types)


def look_of(value: torch.Tensor) -> Look:
    """What makes tensors that look like a value; nothing of its memory is kept."""
    if is_traceable_wrapper_subclass(value):
        return _wrapped(value)
    shape, stride, dtype, device = tuple(value.shape), value.stride(), value.dtype, value.device
    return lambda: torch.empty_strided(shape, stride, dtype=dtype, device=device)


def _wrapped(value: Any) -> Look:
    names, context = value.__tensor_flatten__()
    values = {name: getattr(value, name) for name in names}
    inner = {name: look_of(one) for name, one in values.items() if isinstance(one, torch.Tensor)}
    others = {name: one for name, one in values.items() if name not in inner}  # a DTensor's mesh
    del values
    kind, size, stride = type(value), value.size(), value.stride()

    def make() -> torch.Tensor:
        parts = {**others, **{name: look() for name, look in inner.items()}}
        found: torch.Tensor = kind.__tensor_unflatten__(parts, context, size, stride)
        return found

    return make


_COLLECTIVES = "torch.distributed._functional_collectives"
_AWAITED = "_c10d_functional._wrap_tensor_autograd.default"
_WAIT = "_c10d_functional.wait_tensor.default"


def awaited(op: str, given: torch.Tensor) -> torch.Tensor | None:
    """A collective's result, wrapped until it is first used, and waited for; of other ops ``None``.

    The rules for fake tensors make plain ones of it, with memory of their own; of what is wrapped
    autograd adds up no gradients in place.
    """
    if op == _WAIT:
        return given
    if op != _AWAITED:
        return None
    found: torch.Tensor = sys.modules[_COLLECTIVES].AsyncCollectiveTensor(given)
    return found


_SHARDING = "torch.distributed.tensor._sharding_prop"
#: What runs an op on fake tensors of all ranks together, to know the shape of the whole.
_ASKED = "_propagate_tensor_meta_non_cached"


@contextlib.contextmanager
def shapes_of_the_whole_aside() -> Iterator[None]:
    """Inside, no mode sees how DTensor finds out the shape of the whole: nothing of it is run."""
    propagator = getattr(sys.modules.get(_SHARDING), "ShardingPropagator", None)
    ask = getattr(propagator, _ASKED, None)
    if propagator is None or ask is None:
        yield
        return

    def asked(*args: Any) -> Any:
        with _disable_current_modes():
            return ask(*args)

    setattr(propagator, _ASKED, asked)
    try:
        yield
    finally:
        setattr(propagator, _ASKED, ask)
