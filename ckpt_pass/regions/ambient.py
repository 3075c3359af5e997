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
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ckpt_pass._torch import modes
from ckpt_pass._torch.random_states import same_states
from ckpt_pass._torch.switches import READERS, any_autocast, set_switches, switches_now

AutocastState = tuple[bool, torch.dtype, bool]


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


@dataclass(frozen=True, slots=True)
class Readers:
    """What is called to note what is around a region: functions of C, nearly all, every time.

    Attributes:
        functions: how many modes and hooks there are, what decides which kernels run, and the state
            of autocast.
        kinds: the types of devices whose autocast that is.
    """

    functions: tuple[Callable[[], Any], ...]
    kinds: tuple[str, ...] = ()


_COUNTERS, _SWITCHES_END = len(modes.COUNTERS), len(modes.COUNTERS) + len(READERS)


_is_enabled = torch.is_autocast_enabled


def _autocast_on_cpu() -> bool:
    return _is_enabled("cpu") if any_autocast() else False


@functools.cache
def _readers(*kinds: str) -> Readers:
    autocast: list[Callable[[], Any]] = []
    for kind in kinds:
        autocast += (
            # Of other devices than the CPU torch may not know whether it is on for any.
            _autocast_on_cpu if kind == "cpu" else functools.partial(_is_enabled, kind),
            functools.partial(torch.get_autocast_dtype, kind),
            torch.is_autocast_cache_enabled,
        )
    return Readers((*modes.COUNTERS, *READERS, *autocast), kinds)


#: For a region whose autocast somebody else looks after.
BARE = _readers()
_ON_CPU = _readers("cpu")


def readers_for(devices: tuple[torch.device, ...]) -> Readers:
    """Those for a region whose arguments are on the CPU and on these devices."""
    return _readers("cpu", *dict.fromkeys(d.type for d in devices)) if devices else _ON_CPU


_NONE: tuple[Any, ...] = ()


class Surroundings:
    """Autocast, torch's switches, modes and global hooks, as they are when this is made.

    Args:
        readers: what tells.

    Attributes:
        functions: the ``TorchFunctionMode``s around, a default device among them.
        dispatchers: the ``TorchDispatchMode``s of users' own around.
        hooks: users' hooks on all modules.
        alone: whether there are no modes, nor hooks on all modules.
    """

    __slots__ = ("_read", "_readers", "alone", "dispatchers", "functions", "hooks")

    def __init__(self, readers: Readers) -> None:
        self._readers = readers
        self._read = read = [reader() for reader in readers.functions]
        self.functions = self.dispatchers = self.hooks = _NONE
        # The same numbers are the same surroundings then.
        self.alone = not any(read[:_COUNTERS])
        if not self.alone:
            self.functions, self.hooks = modes.function_modes(), modes.global_hooks()
            self.dispatchers = modes.dispatch_modes()

    def changed(self) -> bool:
        """Whether there is something to enter."""
        now = [reader() for reader in self._readers.functions]
        return not (self.alone and now == self._read) and self._changed(now)

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
        autocast = iter(self._read[_SWITCHES_END:])
        for kind, state in zip(self._readers.kinds, zip(*[autocast] * 3, strict=True), strict=True):
            if _autocast_state(kind) != state:
                enabled, dtype, cache = state
                stack.enter_context(
                    torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cache)
                )
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
        return bool(self.devices) and any(
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
