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

Source = torch.device | torch.Generator


def random_source(op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Source | None:
    """What this call draws from; ``None`` if it draws nothing.

    That is the generator that it is given, or the default one of its device.
    """
    if not draws_random(op, args, kwargs):
        return None
    if any(
        isinstance(mode, functorch.FakeTensorMode) for mode in _get_current_dispatch_mode_stack()
    ):
        return None  # nothing is computed: a trace, or a run on shapes alone
    given: torch.Generator | None = kwargs.get("generator")
    tensor = next(iter(output_tensors((*args, *kwargs.values()))), None)
    device = tensor.device if tensor is not None else torch.device(kwargs.get("device") or "cpu")
    if given is not None:
        device = given.device
    if device.type == "meta":
        return None
    # Reading the state of a generator is an error while its device captures a graph.
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return None if capturing else given or device


def _state(source: Source) -> torch.Tensor:
    """A generator's state: 5,056 bytes on the CPU, 16 on CUDA (torch 2.13), always on the host."""
    if isinstance(source, torch.Generator):
        return source.get_state()
    if source.type == "cpu":
        return torch.get_rng_state()
    state: torch.Tensor = torch.get_device_module(source).get_rng_state(source)
    return state


def _set_state(source: Source, state: torch.Tensor) -> None:
    if isinstance(source, torch.Generator):
        source.set_state(state)
    elif source.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(source).set_rng_state(state, source)


@dataclass(frozen=True, slots=True)
class Draw:
    """The state of a generator before and after an op drew from it."""

    source: Source
    before: torch.Tensor
    after: torch.Tensor

    def skip(self) -> None:
        """Move the generator past the numbers.

        Only if it stands where it stood in the forward: without ``preserve_rng_state`` the
        recomputation draws from the program's own stream, which must not be set back.
        """
        with _disable_current_modes():
            if torch.equal(_state(self.source), self.before):
                _set_state(self.source, self.after)


class DrawWatch:
    """Takes the random state around one op that may draw."""

    __slots__ = ("_before", "_source")

    def __init__(self, op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._source = random_source(op, args, kwargs)
        self._before = None if self._source is None else _state(self._source)

    def finished(self) -> Draw | None:
        """What was drawn since, or ``None``."""
        if self._source is None or self._before is None:
            return None
        return Draw(self._source, self._before, _state(self._source))
