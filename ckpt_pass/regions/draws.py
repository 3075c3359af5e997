"""Random numbers that a saved op drew, and that its region's recomputation must not draw again.

``torch.utils.checkpoint`` gives the recomputation the random state that the region began with. An
op that is recomputed then draws what its forward drew, but only if everything before it draws
too. A saved op does not run again, so the generator is moved past its numbers by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from ckpt_pass._torch import functorch
from ckpt_pass.ops.taxonomy import draws_random
from ckpt_pass.policy.sites import output_tensors


def random_device(op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.device | None:
    """The device whose default generator this call advances, or ``None`` if it draws nothing.

    A generator that the caller passes is the caller's: a checkpoint does not restore it either.
    """
    if not draws_random(op, args, kwargs) or kwargs.get("generator") is not None:
        return None
    if any(
        isinstance(mode, functorch.FakeTensorMode) for mode in _get_current_dispatch_mode_stack()
    ):
        return None  # nothing is computed: a trace, or a run on shapes alone
    tensor = next(iter(output_tensors((*args, *kwargs.values()))), None)
    device = tensor.device if tensor is not None else torch.device(kwargs.get("device") or "cpu")
    if device.type == "meta":
        return None
    # Reading the state of a generator is an error while its device captures a graph.
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return None if capturing else device


def _state(device: torch.device) -> torch.Tensor:
    """A generator's state: 5,056 bytes on the CPU, 16 on CUDA (torch 2.13), always on the host."""
    if device.type == "cpu":
        return torch.get_rng_state()
    state: torch.Tensor = torch.get_device_module(device).get_rng_state(device)
    return state


@dataclass(frozen=True, slots=True)
class Draw:
    """The state of a device's default generator before and after an op drew from it."""

    device: torch.device
    before: torch.Tensor
    after: torch.Tensor

    def skip(self) -> None:
        """Move the generator past the numbers.

        Only if it stands where it stood in the forward: without ``preserve_rng_state`` the
        recomputation draws from the program's own stream, which must not be set back.
        """
        with _disable_current_modes():
            if not torch.equal(_state(self.device), self.before):
                return
        if self.device.type == "cpu":
            torch.set_rng_state(self.after)
        else:
            torch.get_device_module(self.device).set_rng_state(self.after, self.device)


class DrawWatch:
    """Takes the random state around one op that may draw."""

    __slots__ = ("_before", "_device")

    def __init__(self, op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._device = random_device(op, args, kwargs)
        self._before = None if self._device is None else _state(self._device)

    def finished(self) -> Draw | None:
        """What was drawn since, or ``None``."""
        if self._device is None or self._before is None:
            return None
        return Draw(self._device, self._before, _state(self._device))
