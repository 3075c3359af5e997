"""Saved outputs for whose tensors something else stands until they are asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from ckpt_pass._torch import autograd, groups
from ckpt_pass.policy.sites import output_tensors
from ckpt_pass.regions.draws import Draw
from ckpt_pass.regions.region import Saved


class ReplacedOutput(Saved):
    """A saved output whose tensors something else stands for, as far as that is worth it.

    What shares its memory with an argument of the op is held as any saved output: it is somebody
    else's, and there anyway. Who inherits sets what :meth:`replaced` needs before this is made.

    Args:
        output: what the op returned.
        draw: what it drew.
        arguments: those of the op.
        final: whether its versions are; else :meth:`settle` replaces it.
    """

    __slots__ = ("_arguments",)

    def __init__(
        self, output: Any, draw: Draw | None, arguments: tuple[Any, ...], final: bool
    ) -> None:
        super().__init__(output, draw)
        self._arguments = frozenset(_storages(arguments))
        if final:
            self._replace()

    @abstractmethod
    def replaced(self, tensor: torch.Tensor) -> Any:
        """What stands for a tensor; the tensor where that is not worth it."""

    def settle(self) -> None:
        """Replace it, now that autograd has counted the op's change."""
        super().settle()
        self._replace()

    def _replace(self) -> None:
        def put(tensor: torch.Tensor) -> Any:
            anothers = not self._arguments.isdisjoint(_storages((tensor,)))
            return tensor if anothers else self.replaced(tensor)

        # Only what is held has a version to be looked at: what stands for it looks after itself.
        self._hold(tree_map_only(torch.Tensor, put, self._value))


def _storages(values: tuple[Any, ...]) -> Iterator[int]:
    for tensor in output_tensors(values):
        if autograd.is_distributed(tensor):
            tensor = groups.local_part(tensor)
        if type(tensor) is torch.Tensor and tensor.layout is torch.strided:
            yield tensor.untyped_storage()._cdata
