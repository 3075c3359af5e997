"""Which module calls are under way: FQNs for eager code.

The hooks are torch's own global module hooks, in place only inside a ``with`` block and active
only on the thread that entered it (``torch.utils.module_tracker`` works the same way).
"""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from ckpt_pass.policy.sites import ModuleCall, ModulePath

_CALL_CODE = nn.Module._call_impl.__code__
_names_of: weakref.WeakKeyDictionary[nn.Module, dict[int, str]] = weakref.WeakKeyDictionary()


def module_names(root: nn.Module, member: nn.Module | None = None) -> dict[int, str]:
    """FQNs by ``id`` of every module below ``root``; cached until ``member`` is not among them."""
    names = _names_of.get(root)
    if names is None or (member is not None and id(member) not in names):
        names = {id(module): name for name, module in root.named_modules()}
        _names_of[root] = names
    return names


def enclosing_modules() -> list[nn.Module]:
    """The modules whose calls are under way on this thread, outermost first."""
    frame: FrameType | None = sys._getframe(1)
    found: list[nn.Module] = []
    while frame is not None:
        if frame.f_code is _CALL_CODE:
            found.append(frame.f_locals["self"])
        frame = frame.f_back
    return found[::-1]


class ModuleStack:
    """Follows module calls below a root and counts the calls of each.

    Args:
        root: the module that names are relative to; where ``None``, the outermost module whose
            call is under way.
    """

    def __init__(self, root: nn.Module | None = None) -> None:
        outer = enclosing_modules() if root is None else []
        self._root = root if root is not None else (outer[0] if outer else None)
        self._thread = threading.get_ident()
        self._calls: dict[str, int] = {}
        self._path: list[ModuleCall] = []
        for module in outer:
            self._enter(module)

    @property
    def path(self) -> ModulePath:
        """The module calls under way; the root itself is not listed."""
        return tuple(call for call in self._path if call[0])

    @property
    def running(self) -> str:
        """The name of the module that runs; empty for the root."""
        return next((name for name, _ in reversed(self._path) if name), "")

    def _name(self, module: nn.Module) -> str:
        if self._root is None:
            self._root = module
        names = module_names(self._root, module)
        return names.get(id(module), type(module).__name__)

    def _enter(self, module: nn.Module) -> None:
        name = self._name(module)
        call = self._calls.get(name, 0)
        self._calls[name] = call + 1
        self._path.append((name, call))

    def _leave(self) -> None:
        self._path.pop()

    @contextlib.contextmanager
    def followed(self) -> Iterator[ModuleStack]:
        """Follow module calls made on this thread inside the ``with`` block."""
        depth = len(self._path)

        def on_enter(module: nn.Module, _args: Any) -> None:
            if threading.get_ident() == self._thread:
                self._enter(module)

        def on_leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            if threading.get_ident() == self._thread and len(self._path) > depth:
                self._leave()

        handles = [
            register_module_forward_pre_hook(on_enter),
            register_module_forward_hook(on_leave, always_call=True),
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            del self._path[depth:]

    @contextlib.contextmanager
    def inside(self, module: nn.Module) -> Iterator[None]:
        """Take what runs inside the ``with`` block for a call of a module."""
        depth = len(self._path)
        self._enter(module)
        try:
            yield
        finally:
            del self._path[depth:]

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Count no calls that are made inside the ``with`` block, wherever they end."""
        path, calls = list(self._path), dict(self._calls)
        try:
            yield
        finally:
            self._path[:], self._calls = path, calls
