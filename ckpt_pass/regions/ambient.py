"""What is around a region when its forward runs, and must be around its recomputation again.

That is autocast, a default device, torch's switches (default dtype, deterministic algorithms,
allowed attention kernels), and the state of the random generators. Each is looked at only as far as
it costs next to nothing: a region of a small model runs in some 100 microseconds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ckpt_pass._torch import autograd
from ckpt_pass._torch.switches import set_switches, switches_now

AutocastState = tuple[bool, torch.dtype, bool]


def accelerators(tensors: list[torch.Tensor]) -> tuple[torch.device, ...]:
    """The devices other than the CPU that a region's arguments are on, each once."""
    return tuple(dict.fromkeys(t.device for t in tensors if t.device.type not in ("cpu", "meta")))


def _autocast_state(device_type: str) -> AutocastState:
    return (
        torch.is_autocast_enabled(device_type),
        torch.get_autocast_dtype(device_type),
        torch.is_autocast_cache_enabled(),
    )


@dataclass(frozen=True, slots=True)
class Ambient:
    """Autocast, the default device and torch's switches, as they were in a region's forward.

    Attributes:
        autocast: its state, by device type.
        device: the ``with torch.device(...)`` around it, if any.
        switches: what decides which kernels run, and in which precision.
    """

    autocast: tuple[tuple[str, AutocastState], ...]
    device: contextlib.AbstractContextManager[Any] | None
    switches: tuple[Any, ...]

    @classmethod
    def now(cls, devices: tuple[torch.device, ...]) -> Ambient:
        """Look around."""
        known: tuple[tuple[str, AutocastState], ...] = (("cpu", _autocast_state("cpu")),)
        if devices:
            kinds = dict.fromkeys(device.type for device in devices)
            known = (*known, *((kind, _autocast_state(kind)) for kind in kinds))
        return cls(known, autograd.device_context(), switches_now())

    def restore(self, stack: contextlib.ExitStack) -> None:
        """Enter what is not the same now."""
        for kind, state in self.autocast:
            if _autocast_state(kind) != state:
                enabled, dtype, cache = state
                stack.enter_context(
                    torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cache)
                )
        if self.device is not None:
            stack.enter_context(self.device)
        now = switches_now()
        if now != self.switches:
            stack.callback(set_switches, now)
            set_switches(self.switches)


@dataclass(frozen=True, slots=True)
class RandomState:
    """The states of the default generators of the CPU and of the devices in use.

    5,056 bytes for the CPU, 16 for a CUDA device (torch 2.13), all on the host.
    """

    cpu: torch.Tensor
    devices: tuple[tuple[torch.device, torch.Tensor], ...]

    @classmethod
    def now(cls, devices: tuple[torch.device, ...]) -> RandomState:
        """Read them."""
        if not devices:
            return cls(torch.default_generator.get_state(), ())
        read = tuple(
            (device, torch.get_device_module(device).get_rng_state(device)) for device in devices
        )
        return cls(torch.default_generator.get_state(), read)

    def differs(self, other: RandomState) -> bool:
        """Whether any random number was drawn between the two."""
        if not torch.equal(self.cpu, other.cpu):
            return True
        if not self.devices:
            return False
        pairs = zip(self.devices, other.devices, strict=True)
        return any(not torch.equal(mine, theirs) for (_, mine), (_, theirs) in pairs)

    def set(self) -> None:
        """Set the generators to it."""
        torch.default_generator.set_state(self.cpu)
        for device, state in self.devices:
            torch.get_device_module(device).set_rng_state(state, device)


@contextlib.contextmanager
def drawing_from(state: RandomState) -> Iterator[None]:
    """Draw inside what was drawn from ``state`` on; afterwards go on as if nothing had been."""
    before = RandomState.now(tuple(device for device, _ in state.devices))
    state.set()
    try:
        yield
    finally:
        before.set()
