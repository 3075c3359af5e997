"""Whole numbers and masks of a recorded step: real where nothing fake goes into them.

Models look at such tensors. Where one that is real is overwritten later, and fake tensors say with
what, it would go on holding what it held, and the step would go the way of that. What makes it has
to make a fake one then: the step is recorded again, and its forward is asked for the values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from ckpt_pass._torch import autograd

Maker: TypeAlias = tuple[Any, str]
"""An op, and the name of the module that calls it; layers of a row have the same."""

_DIGITS = re.compile(r"\d+")


class StaleNumbers(BaseException):  # no error of the user's, nor for its handlers
    """Real numbers are about to be overwritten with fake ones; says what makes them."""

    def __init__(self, maker: Maker) -> None:
        super().__init__(maker)
        self.maker = maker


def is_number(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds numbers that are not whole: such tensors are always fake."""
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


class RealNumbers:
    """What makes the numbers of a step.

    Args:
        faked: what has to make fake ones.
    """

    def __init__(self, faked: frozenset[Maker]) -> None:
        self._faked = faked
        self._makers: dict[int, Maker] = {}

    def has_to_fake(self, func: Any, module: str) -> bool:
        """Whether an op in a module has to make fake numbers."""
        return bool(self._faked) and _maker(func, module) in self._faked

    def note(self, storages: Sequence[int], func: Any, module: str) -> None:
        """Remember what has made some storages of the step."""
        if storages:
            self._makers |= dict.fromkeys(storages, _maker(func, module))

    def check(
        self,
        given: Sequence[torch.Tensor],
        changes: Sequence[int],
        storage_of: Callable[[torch.Tensor], int],
    ) -> None:
        """Look at an op before it runs.

        Args:
            given: the tensors that it gets.
            changes: the storages of the step that it overwrites.
            storage_of: tells the storage behind a tensor.

        Raises:
            StaleNumbers: it overwrites real ones, and some of the others are fake.
        """
        if not changes or not any(map(autograd.is_fake, given)):
            return
        for tensor in given:
            storage = -1 if autograd.is_fake(tensor) else storage_of(tensor)
            if storage in changes and storage in self._makers:
                raise StaleNumbers(self._makers[storage])


def _maker(func: Any, module: str) -> Maker:
    return func, _DIGITS.sub("*", module)
