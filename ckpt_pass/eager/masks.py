"""How much masks choose whose values are not known, where the backward chooses by them again.

``x[mask] = y`` writes without asking how much that is; its backward takes the gradient's rows by
the same mask, as many as there are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ckpt_pass.eager.answers import Answers, is_mask, written_by_masks

_aten = torch.ops.aten


class _Count:
    """How much a mask chooses, if it was counted; autograd saves a mask before its op runs."""

    chosen: int | None = None


class Masks:
    """The numbers of elements that fake masks choose."""

    def __init__(self) -> None:
        self._counts = WeakTensorKeyDictionary()
        self._saved: dict[int, _Count] = {}

    def note(self, func: Any, args: tuple[Any, ...], answers: Answers) -> None:
        """An op of the forward that writes by masks: what they choose was counted for real."""
        masks = written_by_masks(func, args)
        counts = answers.next_counts(func) if masks else ()
        for mask, count in zip(masks, counts, strict=False):
            self._count_of(mask).chosen = count

    def pack(self, value: torch.Tensor, number: int) -> None:
        """Autograd saves a tensor, as its value of this number."""
        if is_mask(value):
            self._saved[number] = self._count_of(value)

    def unpack(self, value: torch.Tensor, number: int) -> None:
        """The backward is given that value."""
        if number in self._saved:
            self._counts[value] = self._saved[number]

    def _count_of(self, mask: torch.Tensor) -> _Count:
        if mask not in self._counts:
            self._counts[mask] = _Count()
        found: _Count = self._counts[mask]
        return found

    def chosen(self, func: Any, args: tuple[Any, ...]) -> Any:
        """What an op of the backward chooses by such masks; ``None`` where that is not known."""
        if func is _aten.index.Tensor:
            masks = [index for index in args[1] if is_mask(index)]
            if masks and all(self._count_of(mask).chosen is not None for mask in masks):
                found = [index for mask in args[1] for index in self._as_numbers(mask)]
                return func(args[0], found)
        if func is _aten.masked_select.default:
            count = self._count_of(args[1]).chosen
            return None if count is None else args[0].new_empty(count)
        return None

    def _as_numbers(self, index: torch.Tensor | None) -> list[torch.Tensor | None]:
        if index is None or not is_mask(index):
            return [index]
        count = self._count_of(index).chosen
        assert count is not None, "asked where all are known"
        return [index.new_empty(count, dtype=torch.long) for _ in range(index.dim())]
