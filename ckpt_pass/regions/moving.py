"""Outputs of a region's ops that are put away when they are made, and fetched for its rerun."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from ckpt_pass.offloading.store import MovedValueChangedError
from ckpt_pass.offloading.window import Moved, Window
from ckpt_pass.ops.taxonomy import op_name
from ckpt_pass.regions.draws import Draw
from ckpt_pass.regions.region import MutatedActivationError, changed_in_place
from ckpt_pass.regions.replaced import ReplacedOutput


class MovedOutput(ReplacedOutput):
    """A saved output whose tensors are elsewhere, as far as they are worth moving.

    Args:
        output, draw, arguments, final: see :class:`ReplacedOutput`.
        window: what puts its tensors away.
    """

    __slots__ = ("_window",)

    def __init__(
        self,
        output: Any,
        draw: Draw | None,
        window: Window,
        arguments: tuple[Any, ...],
        final: bool = True,
    ) -> None:
        self._window = window
        super().__init__(output, draw, arguments, final)

    def replaced(self, tensor: torch.Tensor) -> Any:
        """What is on its way, for a tensor."""
        return self._window.put(tensor) if self._window.is_worth_moving(tensor) else tensor

    def recount(self) -> None:
        """Take the versions of what is held, and of what is on its way."""
        super().recount()
        for moved in _moved_in(self._value):
            moved.ticket.recount()

    def storages(self) -> Iterator[int]:
        """The storages that this output holds, and those that were put away."""
        yield from super().storages()
        for moved in _moved_in(self._value):
            yield moved.ticket.storage_address

    def copy(self) -> None:
        """Hold copies from now on; what is on its way is waited for."""
        for moved in _moved_in(self._value):
            moved.ticket.release()
            moved.ticket.close()
        self._hold(tree_map_only(torch.Tensor, torch.clone, self._value))

    def take(self, op: Any, again: bool = False) -> Any:
        """Hand the value out, once (:meth:`Saved.take`).

        Raises:
            StoreReadError: it could not be read.
        """
        value = super().take(op, again)
        try:
            taken = tree_map_only(Moved, Moved.take, value)
        except MovedValueChangedError as error:
            raise MutatedActivationError(changed_in_place(op_name(op))) from error
        self._window.fetch_next()
        return taken


def _moved_in(value: Any) -> Iterator[Moved]:
    if isinstance(value, Moved):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _moved_in(item)
