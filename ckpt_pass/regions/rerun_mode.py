"""The dispatch mode of a recomputation: it hands out what the region's forward has saved."""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

import torch

from ckpt_pass._torch import functorch, selective
from ckpt_pass._torch.dispatch import QuickMode
from ckpt_pass._torch.operators import OpOverload
from ckpt_pass.regions.actions import (
    IGNORED,
    SIMPLE,
    is_cached_cast,
    is_mutable,
    overwritten,
    simple_call,
    statistics,
)
from ckpt_pass.regions.light_hooks import LightHooks
from ckpt_pass.regions.outside import Outside
from ckpt_pass.regions.region import RegionMemory
from ckpt_pass.regions.statistics import Owners, run_again, running_statistics, with_copies
from ckpt_pass.regions.writes import check_reads


class Pausable(Protocol):
    """The mode of the region's forward."""

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Let ops pass meanwhile."""
        ...


def key_of(op: Any, args: tuple[Any, ...]) -> Any:
    """What occurrences of an op are counted by; to hash an op itself is a call into Python."""
    return id(op) if isinstance(op, OpOverload) else selective.key_of(op, args)


class RecomputeMode(QuickMode):
    """Runs a region again and hands out what its forward saved."""

    _buffers: frozenset[int] = frozenset()
    _stand_ins: frozenset[int] = frozenset()
    _reads_statistics = False
    _collects = False
    _has_suspects = False
    _pause: contextlib.AbstractContextManager[None] | None = None

    def __init__(
        self,
        memory: RegionMemory,
        hooks: LightHooks | None = None,
        owners: Owners = (),
        forward: Pausable | None = None,
        outside: Outside | None = None,
    ) -> None:
        super().__init__()
        self._owners = owners
        self._forward = forward
        self._memory = memory
        self._counted = memory.entries
        self._hooks = hooks
        self._outside: Outside | None = None
        #: The same, where whoever runs the region puts it in.
        self._state = outside

    def __enter__(self) -> RecomputeMode:
        self._memory.start_recompute()
        outside = self._outside = None if self._hooks is None else self._hooks.outside
        if outside is not None:
            outside.put_in()
            self._has_suspects = bool(outside.suspects)
            self._owners = outside.owners_of_statistics()
        if self._forward is not None and not self._memory.complete:
            self._pause = self._forward.paused()
            self._pause.__enter__()
        if self._owners:
            self._look_at_statistics(self._state if outside is None else outside)
        self._collects = self._hooks is not None and self._hooks.enter_recompute()
        super().__enter__()
        return self

    def _look_at_statistics(self, outside: Outside | None) -> None:
        buffers = frozenset(running_statistics(self._owners))
        if outside is not None:
            self._stand_ins = outside.stand_ins
            self._reads_statistics = outside.known.reads_statistics
        self._buffers = buffers - self._stand_ins

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        try:
            if self._hooks is not None and self._collects:
                self._hooks.exit_recompute(failed=exc[0] is not None)
            if self._memory.window is not None:
                self._memory.window.fetch_before()
        finally:
            try:
                pause, self._pause = self._pause, None
                if pause is not None:
                    pause.__exit__(None, None, None)
            finally:
                if self._outside is not None:
                    self._outside.put_back()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self._has_suspects and self._outside is not None:
            check_reads(self._outside, func, args, kwargs or {})
        known = SIMPLE.get(id(func))
        call = known[0] if known is not None else simple_call(func)
        if call is None:
            return self._dispatch(func, args, kwargs or {})
        if id(func) in self._counted:
            entry = self._memory.next(id(func), func)
            if entry is not None:
                return entry.take(func, again=not self._memory.complete)
        return call(*args, **kwargs) if kwargs else call(*args)

    def _dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Everything else: what overwrites tensors, moves statistics, or may not be counted."""
        if func not in IGNORED and is_mutable(func):
            if not self._memory.complete:
                self._memory.about_to_change(overwritten(func, args, kwargs))
            if self._buffers:
                args = with_copies(func, args, kwargs, self._buffers)
        # What is ignored is never counted.
        if func in IGNORED or is_cached_cast(func, args):
            return run_again(func, args, kwargs, self._stand_ins)
        entry = self._memory.next(key_of(func, args), func)
        if entry is None:
            return run_again(func, args, kwargs, self._stand_ins)
        if self._reads_statistics and statistics(func):  # what comes of it is there; they are not
            run_again(func, args, kwargs, self._stand_ins)
        value = entry.take(func, again=not self._memory.complete)
        if is_mutable(func) and functorch.proxy_graph() is None:
            with torch.no_grad():
                args[0].copy_(value)
            return args[0]
        return value
