"""Outputs of a region's ops that are put away when they are made, and fetched for its rerun."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from ckpt_pass.offloading.store import MovedValueChangedError
from ckpt_pass.offloading.window import Moved, Window
from ckpt_pass.ops.taxonomy import op_name
from ckpt_pass.policy.sites import output_tensors
from ckpt_pass.regions.draws import Draw
from ckpt_pass.regions.region import MutatedActivationError, Saved, changed_in_place


class MovedOutput(Saved):
    """A saved output whose tensors are elsewhere, as far as they are worth moving.

    What shares its memory with an argument of the op is held as any saved output: it is somebody
    else's, and there anyway.

    Args:
        output: what the op returned.
        draw: what it drew.
        window: what puts its tensors away.
        arguments: those of the op.
        settled: whether its versions are final; else :meth:`settle` puts it away.
    """

    __slots__ = ("_arguments", "_window")

    def __init__(
        self,
        output: Any,
        draw: Draw | None,
        window: Window,
        arguments: tuple[Any, ...],
        settled: bool = True,
    ) -> None:
        super().__init__(output, draw)
        self._window = window
        self._arguments = frozenset(t.untyped_storage()._cdata for t in _plain(arguments))
        if settled:
            self._put()

    def settle(self) -> None:
        """Put it away, now that autograd has counted the op's change."""
        super().settle()
        self._put()

    def recount(self) -> None:
        """Take the versions of what is held, and of what is on its way."""
        super().recount()
        for moved in _moved_in(self._value):
            moved.ticket.recount()

    def _put(self) -> None:
        def put(tensor: torch.Tensor) -> Any:
            if not self._window.is_worth_moving(tensor):
                return tensor
            if tensor.untyped_storage()._cdata in self._arguments:
                return tensor
            return self._window.put(tensor)

        # Only what is held has a version to be looked at: a ticket looks after itself.
        value = tree_map_only(torch.Tensor, put, self._value)
        self._hold(value)

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


def _plain(arguments: tuple[Any, ...]) -> Iterator[torch.Tensor]:
    for tensor in output_tensors(arguments):
        if type(tensor) is torch.Tensor and tensor.layout is torch.strided:
            yield tensor
