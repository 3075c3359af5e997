"""What a region runs after the last value that autograd saves.

A recomputation may stop there. To do so takes an exception, which the C++ code of the op that saves
has to let through, and every call above it: some 25 microseconds in all. Where less is left than
that, the recomputation goes on to its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckpt_pass.policy.sites import output_tensors
from ckpt_pass.regions.actions import is_free
from ckpt_pass.regions.saved_values import Looks

#: So many elements are read and written in some ten microseconds of a CPU's thread.
_FEW_ELEMENTS = 1 << 14
_FEW_OPS = 4
_MANY = _FEW_ELEMENTS + 1


class Tail:
    """Counts what a region's ops touch after each value that autograd saves.

    Args:
        looks: those of the saved values, of which there will be more.
    """

    __slots__ = ("_elements", "_looks", "_ops", "_saved")

    def __init__(self, looks: Sequence[Looks]) -> None:
        self._looks = looks
        self._saved = self._ops = self._elements = 0

    def ran(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Count an op, which has run now; its inputs have been saved by now, its output has not."""
        self._begin_anew()
        if not is_free(op):
            self._ops += 1
            for tensor in output_tensors((*args, *kwargs.values(), output)):
                size = tensor.numel()
                # A size that is left open is not looked at: that would fix it.
                self._elements += size if type(size) is int else _MANY

    def _begin_anew(self) -> None:
        if len(self._looks) != self._saved:
            self._saved, self._ops, self._elements = len(self._looks), 0, 0

    def is_short(self) -> bool:
        """Whether little has run since the last value was saved."""
        self._begin_anew()
        return self._ops <= _FEW_OPS and self._elements <= _FEW_ELEMENTS
