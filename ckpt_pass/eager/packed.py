"""What autograd holds of a recorded step."""

from __future__ import annotations

import torch

from ckpt_pass._torch.wrappers import look_of
from ckpt_pass.eager.step_record import EagerTrace
from ckpt_pass.graph.calls import MadeBy


class Packed:
    """What autograd holds instead of a value; the record is told when it lets go.

    Args:
        trace: the record.
        number: of the value among those that autograd saves.
        value: what is saved; its looks are kept, not its memory.
        made_by: the call that made it.
        real: a copy of its values, where the backward will ask for them.
    """

    __slots__ = ("_trace", "look", "made_by", "number", "real")

    def __init__(
        self,
        trace: EagerTrace,
        number: int,
        value: torch.Tensor,
        made_by: MadeBy | None,
        real: torch.Tensor | None,
    ) -> None:
        self._trace = trace
        self.number = number
        self.look = look_of(value)
        self.made_by = made_by
        self.real = real

    def __del__(self) -> None:
        self._trace.saved[self.number].released = len(self._trace.ops)
