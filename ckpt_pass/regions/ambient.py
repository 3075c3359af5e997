"""What is around a region when its forward runs, and must be around its recomputation again.

That is autocast, modes (a default device among them), global hooks of modules, torch's switches
(default dtype, deterministic algorithms, allowed attention kernels), and the state of the random
generators. Each is looked at only as far as it costs next to nothing: a region of a small model
runs in some 100 microseconds.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ckpt_pass._torch import modes
from ckpt_pass._torch.random_states import same_states
from ckpt_pass._torch.switches import READERS, set_switches, switches_now

AutocastState = tuple[bool, torch.dtype, bool]
Readers = tuple[Callable[[], Any], ...]


def accelerators(tensors: list[torch.Tensor]) -> tuple[torch.device, ...]:
    """The devices other than the CPU that a region's arguments are on, each once."""
    for tensor in tensors:
        if not (tensor.is_cpu or tensor.is_meta):
            break
    else:
        return ()
    return tuple(dict.fromkeys(t.device for t in tensors if t.device.type not in ("cpu", "meta")))


def _autocast_state(device_type: str) -> AutocastState:
    return (
        torch.is_autocast_enabled(device_type),
        torch.get_autocast_dtype(device_type),
        torch.is_autocast_cache_enabled(),
    )


#: Of these all are called in every run of a region, twice; they are of C.
_SURROUNDINGS: Readers = (*modes.COUNTERS, *READERS)
_COUNTERS, _SWITCHES_END = len(modes.COUNTERS), len(_SURROUNDINGS)
_AUTOCAST: Readers = (
    functools.partial(torch.is_autocast_enabled, "cpu"),
    functools.partial(torch.get_autocast_dtype, "cpu"),
    torch.is_autocast_cache_enabled,
)
_NONE: tuple[Any, ...] = ()


class Surroundings:
    """Torch's switches, modes and global hooks, as they are when this is made, in a forward.

    Attributes:
        functions: the ``TorchFunctionMode``s around, a default device among them.
        dispatchers: the ``TorchDispatchMode``s of users' own around.
        hooks: users' hooks on all modules.
    """

    __slots__ = ("_alone", "_read", "dispatchers", "functions", "hooks")
    _readers = _SURROUNDINGS

    def __init__(self) -> None:
        #: How many modes and hooks there are, what decides which kernels run, and what derived
        #: classes read.
        self._read = read = [reader() for reader in self._readers]
        self.functions = self.dispatchers = self.hooks = _NONE
        #: Whether there are no modes and hooks. The same numbers are the same surroundings then.
        self._alone = not any(read[:_COUNTERS])
        if not self._alone:
            self.functions, self.hooks = modes.function_modes(), modes.global_hooks()
            self.dispatchers = modes.dispatch_modes()

    def changed(self) -> bool:
        """Whether there is something to enter."""
        now = [reader() for reader in self._readers]
        return not (self._alone and now == self._read) and self._changed(now)

    def _changed(self, now: list[Any]) -> bool:
        return (
            now[_COUNTERS:] != self._read[_COUNTERS:]
            or modes.function_modes() != self.functions
            or modes.global_hooks() != self.hooks
            or bool(self._missing())
        )

    def _missing(self) -> list[Any]:
        """What dispatched in the forward and does not now; what does only now may look on."""
        now = {id(mode) for mode in modes.dispatch_modes()} if self.dispatchers else ()
        return [mode for mode in self.dispatchers if id(mode) not in now]

    def restore(self, stack: contextlib.ExitStack) -> None:
        """Enter what is not the same now."""
        switches, functions, hooks = switches_now(), modes.function_modes(), modes.global_hooks()
        before = self._read[_COUNTERS:_SWITCHES_END]
        if switches != before:
            stack.callback(set_switches, switches)
            set_switches(before)
        if functions != self.functions:
            stack.callback(modes.set_function_modes, functions)
            modes.set_function_modes(self.functions)
        if hooks != self.hooks:
            stack.callback(modes.set_global_hooks, hooks)
            modes.set_global_hooks(self.hooks)
        for mode in self._missing():
            # Not by its own `__enter__`, which may do more: the user has entered it once.
            TorchDispatchMode.__enter__(mode)
            stack.callback(TorchDispatchMode.__exit__, mode, None, None, None)


class Ambient(Surroundings):
    """Autocast, and the surroundings of every region, as they are when this is made.

    Args:
        devices: those of the region's arguments, other than the CPU.
    """

    __slots__ = ("_autocast",)
    _readers = _SURROUNDINGS + _AUTOCAST

    def __init__(self, devices: tuple[torch.device, ...]) -> None:
        super().__init__()
        #: Its state on devices, by type.
        self._autocast: dict[str, AutocastState] | None = None
        if devices:
            self._autocast = {d.type: _autocast_state(d.type) for d in devices}

    def changed(self) -> bool:
        """Whether there is something to enter."""
        states = self._autocast
        if states and any(_autocast_state(kind) != state for kind, state in states.items()):
            return True
        return super().changed()

    def restore(self, stack: contextlib.ExitStack) -> None:
        """Enter what is not the same now."""
        enabled, dtype, cache = self._read[_SWITCHES_END:]
        states = {"cpu": (enabled, dtype, cache)} | (self._autocast or {})
        for kind, state in states.items():
            if _autocast_state(kind) != state:
                enabled, dtype, cache = state
                stack.enter_context(
                    torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cache)
                )
        super().restore(stack)


class RandomState:
    """The states of the default generators of the CPU and of the devices in use, read now.

    5,056 bytes for the CPU, 16 for a CUDA device (torch 2.13), all on the host.
    """

    __slots__ = ("cpu", "devices")

    def __init__(self, devices: tuple[torch.device, ...]) -> None:
        self.cpu = torch.get_rng_state()
        self.devices: tuple[tuple[torch.device, torch.Tensor], ...] = ()
        if devices:
            self.devices = tuple(
                (device, torch.get_device_module(device).get_rng_state(device))
                for device in devices
            )

    def moved(self) -> bool:
        """Whether any random number was drawn since."""
        if not same_states(self.cpu, torch.get_rng_state()):
            return True
        return any(
            not same_states(state, torch.get_device_module(device).get_rng_state(device))
            for device, state in self.devices
        )

    def set(self) -> None:
        """Set the generators to it."""
        torch.default_generator.set_state(self.cpu)
        for device, state in self.devices:
            torch.get_device_module(device).set_rng_state(state, device)


@contextlib.contextmanager
def drawing_from(state: RandomState) -> Iterator[None]:
    """Draw inside what was drawn from ``state`` on; afterwards go on as if nothing had been."""
    before = RandomState(tuple(device for device, _ in state.devices))
    state.set()
    try:
        yield
    finally:
        before.set()
