"""What a region keeps a part of on each rank: outputs of its ops, and its arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from ckpt_pass.offloading.sharding import Sharding
from ckpt_pass.offloading.shards import ShardedValue, worth_sharding
from ckpt_pass.regions.arguments import named_arguments
from ckpt_pass.regions.draws import Draw
from ckpt_pass.regions.replaced import ReplacedOutput


class ShardedOutput(ReplacedOutput):
    """A saved output of which a part is kept here, as far as it is worth it; gathered when taken.

    Args:
        output, draw, arguments, final: see :class:`ReplacedOutput`.
        sharding: over which ranks.
        where: what it is, for messages.
        seen: what ranks have compared already (:class:`ShardedValue`).
    """

    __slots__ = ("_seen", "_sharding", "_where")

    def __init__(
        self,
        output: Any,
        draw: Draw | None,
        sharding: Sharding,
        where: str,
        seen: set[str],
        arguments: tuple[Any, ...],
        final: bool = True,
    ) -> None:
        self._sharding, self._where, self._seen = sharding, where, seen
        super().__init__(output, draw, arguments, final)

    def replaced(self, tensor: torch.Tensor) -> Any:
        """This rank's part of a tensor."""
        if not worth_sharding(tensor, self._sharding):
            return tensor
        return ShardedValue(tensor, self._sharding, self._where, self._seen)

    def take(self, op: Any, again: bool = False) -> Any:
        """Hand the value out, once (:meth:`Saved.take`); every rank of the group has to.

        Raises:
            ShardedValueDiffersError, ShardOrderError, ShardGroupError: see :class:`ShardedValue`.
        """
        return tree_map_only(ShardedValue, ShardedValue.take, super().take(op, again))


class ShardedArguments:
    """Keeps a part of each activation among a region's arguments, for :class:`Arguments`.

    Args:
        sharding: over which ranks, and which of the arguments.
        name: of the region.
        seen: what ranks have compared already (:class:`ShardedValue`).
        args, kwargs: its arguments.
    """

    def __init__(
        self,
        sharding: Sharding,
        name: str,
        seen: set[str],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self._sharding = sharding
        self._seen = seen
        self._region = name
        found = list(named_arguments(args, kwargs))
        if sharding.arguments == "first":
            del found[1:]
        self._names = {id(tensor): name for name, tensor in found}

    def takes(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is kept in parts: one that has a history, as others are there anyway."""
        named = id(tensor) in self._names and tensor.grad_fn is not None
        return named and worth_sharding(tensor, self._sharding)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | ShardedValue:
        """Keep a part of a tensor, or the tensor."""
        if not self.takes(tensor):
            return tensor
        where = f"the argument {self._names[id(tensor)]} of {self._region}"
        return ShardedValue(tensor, self._sharding, where, self._seen)

    def unpack(self, packed: torch.Tensor | ShardedValue) -> torch.Tensor:
        """The tensor again.

        Raises:
            ShardedValueDiffersError, ShardOrderError, ShardGroupError: see :class:`ShardedValue`.
        """
        return packed.take() if isinstance(packed, ShardedValue) else packed
