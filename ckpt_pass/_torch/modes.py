"""Modes and global hooks of modules that users have put around what runs: read and set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch.nn.modules import module as nn_module
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode

_OURS = "ckpt_pass"
#: Theirs only look at what runs (module trackers, counters), for as long as they are in place.
_LIBRARIES = frozenset((_OURS, "torch"))

_FORWARD_HOOKS: tuple[dict[int, Any], ...] = (
    nn_module._global_forward_pre_hooks,
    nn_module._global_forward_hooks,
)
#: How many modes and global hooks there are, nearly always none: all of C.
COUNTERS: tuple[Callable[[], int], ...] = (
    torch._C._len_torch_function_stack,
    torch._C._len_torch_dispatch_stack,
    *(hooks.__len__ for hooks in _FORWARD_HOOKS),
)
#: What is said of some hooks, by their numbers.
_ABOUT_HOOKS: tuple[dict[int, Any], ...] = (
    nn_module._global_forward_hooks_always_called,
    nn_module._global_forward_hooks_with_kwargs,
)
#: Forward hooks by number, those that run before first; then what is said of them.
GlobalHooks: TypeAlias = tuple[dict[int, Any], ...]


def _library(module: object) -> str:
    return module.partition(".")[0] if isinstance(module, str) else ""


def function_modes() -> tuple[Any, ...]:
    """The ``TorchFunctionMode``s around, outermost first; ``torch.device(...)`` is one, too."""
    if not torch._C._len_torch_function_stack():
        return ()
    modes = _get_current_function_mode_stack()
    return tuple(mode for mode in modes if _library(type(mode).__module__) != _OURS)


def set_function_modes(modes: Iterable[Any]) -> None:
    """Let these be around, and no others but this library's."""
    now = [_pop_mode() for _ in range(torch._C._len_torch_function_stack())][::-1]
    for mode in (*modes, *(m for m in now if _library(type(m).__module__) == _OURS)):
        _push_mode(mode)


def dispatch_modes() -> tuple[Any, ...]:
    """The ``TorchDispatchMode``s of users' own around, outermost first."""
    count = torch._C._len_torch_dispatch_stack()
    if not count:
        return ()
    modes = map(torch._C._get_dispatch_stack_at, range(count))
    return tuple(mode for mode in modes if _library(type(mode).__module__) not in _LIBRARIES)


def global_hooks() -> GlobalHooks:
    """Users' hooks on the forwards of all modules; empty where there are none."""
    if not any(_FORWARD_HOOKS):
        return ()
    kept = [
        {
            number: hook
            for number, hook in hooks.items()
            if _library(getattr(hook, "__module__", None)) not in _LIBRARIES
        }
        for hooks in _FORWARD_HOOKS
    ]
    if not any(kept):
        return ()
    numbers = {number for hooks in kept for number in hooks}
    about = [{n: said for n, said in known.items() if n in numbers} for known in _ABOUT_HOOKS]
    return (*kept, *about)


def set_global_hooks(hooks: GlobalHooks) -> None:
    """Let these be the users' hooks on the forwards of all modules."""
    now = global_hooks()
    for place, known in enumerate((*_FORWARD_HOOKS, *_ABOUT_HOOKS)):
        for number in now[place] if now else ():
            del known[number]
        known.update(hooks[place] if hooks else {})
