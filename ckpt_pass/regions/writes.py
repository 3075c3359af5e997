"""Learn which tensors around it a region overwrites, so that they are copied before it runs again.

A region's own updates of buffers (scales, moving averages, power iterations) must not be seen by
its recomputation, nor made twice. To copy all of its tensors would cost their bytes in every run;
to look at every op costs some 11 microseconds each. So its ops are looked at in its first run only.
A tensor that is first overwritten later is an error in that run's backward, and known from then on.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from ckpt_pass._torch.dispatch import QuickMode
from ckpt_pass._torch.operators import argument_value
from ckpt_pass.ops.taxonomy import draws_random
from ckpt_pass.regions.actions import (
    FILL_WHAT_IS_SAVED,
    is_free,
    is_mutable,
    overwritten,
    statistics,
)
from ckpt_pass.regions.behind import modules_behind
from ckpt_pass.regions.known import Known
from ckpt_pass.regions.outside import Outside
from ckpt_pass.regions.tails import Tail
from ckpt_pass.state.remembered import Remembered

#: Of functions, by their code (a lambda is made anew for every run), by the module that they run.
_known: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, Known]] = (
    weakref.WeakKeyDictionary()
)
_of_modules: Remembered[nn.Module, Known] = Remembered(lambda _: Known())


def known_of(fn: Any, *arguments: Any) -> Known:
    """What is known of a function or module; shared by all regions that run it.

    Args:
        fn: the function or module.
        arguments: what it is called with: a function may run a module among them.
    """
    while not isinstance(fn, nn.Module):
        if isinstance(fn, functools.partial):
            fn, arguments = fn.func, (*arguments, fn.args, fn.keywords)
        elif isinstance(fn, types.MethodType) and isinstance(fn.__self__, nn.Module):
            fn = fn.__self__
        else:
            return _of_code(fn, next(modules_behind(fn, *arguments), None))
    return _of_modules(fn)


def forget(module: nn.Module) -> None:
    """Take away what is known of a module's regions; they find it out anew."""
    _of_modules.forget(module)


def _of_code(fn: Any, module: nn.Module | None) -> Known:
    inner = fn.__func__ if isinstance(fn, types.MethodType) else fn
    code = getattr(inner, "__code__", inner)
    try:
        by_module = _known.setdefault(code, weakref.WeakKeyDictionary())
    except TypeError:  # neither hashed nor referred to weakly: looked at in every run
        return Known()
    of = Known if module is None else module
    found = by_module.get(of)
    if found is None:
        found = by_module[of] = Known()
    return found


class WriteWatch(QuickMode):
    """Copies tensors around a region before the region's forward overwrites them.

    Args:
        outside: those.
        tail: is told of each op.
    """

    def __init__(self, outside: Outside, tail: Tail | None = None) -> None:
        super().__init__()
        self._outside = outside
        self._tail = tail
        self._storages = outside.storages()
        #: Storages of the running statistics that were moved, by address.
        self._statistics: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self.look(func, args, kwargs)
        output = func(*args, **kwargs)
        if self._tail is not None:
            self._tail.ran(func, args, kwargs, output)
        return output

    def look(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Copy what an op is about to overwrite, note what it reads, and whether it draws."""
        known = self._outside.known
        for tensor in tensors_in(args, kwargs):
            self._outside.about_to_read(tensor)
        self._note_statistics(func, args, kwargs)
        known.fills |= func in FILL_WHAT_IS_SAVED
        known.draws |= draws_random(func, args, kwargs)
        for tensor in written(func, args, kwargs):
            if _address(tensor) in self._storages:
                self._outside.about_to_change(tensor)
            else:
                self._outside.changed_anew |= _kept_addresses(tensor)

    def _note_statistics(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note whether an op reads what a normalisation has moved; one that moves them does not."""
        statistics = [*moved_statistics(func, args)]
        moves = statistics and argument_value(func, "training", args, kwargs) is True
        moved = set(map(_address, statistics)) if moves else set()
        read = set(map(_address, tensors_in(args, kwargs))) - moved
        self._outside.known.reads_statistics |= not read.isdisjoint(self._statistics)
        self._statistics |= _kept_addresses(*statistics)


class ReadWatch(QuickMode):
    """Refuses to let a recomputation read what has moved since its forward."""

    def __init__(self, outside: Outside) -> None:
        super().__init__()
        self._outside = outside

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        check_reads(self._outside, func, args, kwargs)
        return func(*args, **kwargs)


def check_reads(outside: Outside, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise where an op reads what has moved; what only looks at it (a view) does not.

    Raises:
        MutatedStateError: it does.
    """
    if not is_free(func):
        outside.check_read(tensors_in(args, kwargs))


def tensors_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors among an op's arguments, and in lists there."""
    for value in (*args, *kwargs.values()):
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, torch.Tensor):
                yield item


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors that an op overwrites, running statistics among them."""
    if is_mutable(func):
        yield from overwritten(func, args, kwargs)
    yield from moved_statistics(func, args)


def moved_statistics(func: Any, args: tuple[Any, ...]) -> Iterator[torch.Tensor]:
    """The running statistics that an op overwrites; in evaluation, too, though only read then."""
    for index in statistics(func):
        if index < len(args) and isinstance(args[index], torch.Tensor):
            yield args[index]


def _kept_addresses(*tensors: torch.Tensor) -> dict[int, StorageWeakRef]:
    """The addresses of storages; as long as the references are there nothing else gets them."""
    plain = ((tensor, _address(tensor)) for tensor in tensors)
    return {found: StorageWeakRef(t.untyped_storage()) for t, found in plain if found}


def _address(tensor: torch.Tensor) -> int:
    plain = type(tensor) is torch.Tensor or type(tensor) is nn.Parameter
    return tensor.untyped_storage()._cdata if plain and tensor.layout is torch.strided else 0
