"""What a recomputation may leave switched: it may end in between, where a region would switch back.

Which tensors require gradients, torch's own switches, and the hooks on tensors: some that the
recomputation puts there would be there twice.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ckpt_pass._torch.switches import set_switches, switches_now

_requires_grad = operator.attrgetter("requires_grad")
_hooks_of = operator.attrgetter("_backward_hooks")


class Switched:
    """All of it as it is before a recomputation.

    Args:
        tensors: those around the region.
        flags: whether each of them requires gradients.
    """

    __slots__ = ("_flags", "_hooks", "_switches", "_tensors")

    def __init__(self, tensors: Sequence[torch.Tensor], flags: list[bool]) -> None:
        self._tensors, self._flags, self._switches = tensors, flags, switches_now()
        hooks = list(map(_hooks_of, tensors))
        self._hooks: list[dict[int, Any]] = [dict(on or ()) for on in hooks] if any(hooks) else []

    def put_back(self) -> None:
        """Make it so again."""
        if list(map(_requires_grad, self._tensors)) != self._flags:
            switch_flags(self._tensors, self._flags)
        if switches_now() != self._switches:
            set_switches(self._switches)
        hooks = list(map(_hooks_of, self._tensors))
        if any(hooks):
            none: dict[int, Any] = {}
            _put_back_hooks(hooks, self._hooks or [none] * len(hooks))


def switch_flags(tensors: Sequence[torch.Tensor], flags: Iterable[bool]) -> None:
    """Let leaves require gradients, or not."""
    for tensor, flag in zip(tensors, flags, strict=True):
        if tensor.requires_grad is not flag and tensor.is_leaf:
            tensor.requires_grad_(flag)


def _put_back_hooks(now: list[dict[int, Any] | None], before: list[dict[int, Any]]) -> None:
    for on, were in zip(now, before, strict=True):
        if on is not None and on.keys() != were.keys():
            on.clear()
            on.update(were)
