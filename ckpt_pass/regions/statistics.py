"""Memory around a region that its runs move on: running statistics, counters, buffers."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from ckpt_pass.regions.actions import overwritten, statistics
from ckpt_pass.regions.buffers import running_buffers
from ckpt_pass.regions.outside import Outside

Owners = tuple[nn.Module, ...]


def running_statistics(owners: Owners) -> Iterator[int]:
    """The storages of the buffers that normalisations in training update, by their address."""
    return (buffer.untyped_storage()._cdata for buffer in running_buffers(owners))


def run_again(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], stand_ins: Collection[int] = ()
) -> Any:
    """Run an op as its forward did, but leave running statistics alone: the forward moved them.

    Args:
        func, args, kwargs: the call.
        stand_ins: storages of statistics that are the recomputation's own, by address: what reads
            them afterwards is to see them moved.
    """
    positions = statistics(func)
    if positions:
        args = tuple(
            value.clone() if index in positions and _is_others(value, stand_ins) else value
            for index, value in enumerate(args)
        )
    return func(*args, **kwargs)


def _is_others(value: Any, stand_ins: Collection[int]) -> bool:
    return isinstance(value, torch.Tensor) and value.untyped_storage()._cdata not in stand_ins


def with_copies(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], buffers: frozenset[int]
) -> tuple[Any, ...]:
    """The arguments of an op, but copies of the buffers that it would change once more.

    Args:
        func, args, kwargs: the call.
        buffers: their storages, by address.
    """
    changed = {
        id(tensor)
        for tensor in overwritten(func, args, kwargs)
        if tensor.untyped_storage()._cdata in buffers
    }
    return tuple(value.clone() if id(value) in changed else value for value in args)


def state_addresses(outside: Outside | None, owners: Owners) -> frozenset[int]:
    """The storages that a region finds there, by their address.

    Args:
        outside: what it reads besides its arguments.
        owners: modules with running statistics, where ``outside`` does not say.
    """
    if outside is None:
        return frozenset(running_statistics(owners))
    found = running_statistics(owners or outside.owners_of_statistics())
    return frozenset((*outside.storages(), *found))
