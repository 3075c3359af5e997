"""Objects among the arguments of module calls: a region holds them, and what is put in later.

A region copies containers, and holds anything else as it is: a cache that its layers fill keeps
what they have put there until the region is done. Of what is emptied for it (a cache of keys) it
lets go when it ends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ckpt_pass.eager.step_record import CallRecord
from ckpt_pass.regions.caches import is_emptied
from ckpt_pass.regions.kinds import ATOMS
from ckpt_pass.state.holders import Reached

_CONTAINERS = (list, tuple, set, dict)


class HeldObjects:
    """Looks at the objects that module calls get.

    Args:
        storages_of: tells the step's storages behind some tensors.
    """

    def __init__(self, storages_of: Callable[[Any], tuple[int, ...]]) -> None:
        self._storages_of = storages_of
        self._open: list[tuple[list[Any], list[Any]]] = []
        self._by_call: list[tuple[CallRecord, list[int]]] = []
        self._contents: dict[int, tuple[int, ...]] = {}

    def enter(self) -> None:
        """A call begins."""
        self._open.append(([], []))

    def note(self, module: nn.Module, call: CallRecord, arguments: Any) -> None:
        """The call that began last is one of a module with these arguments."""
        found: list[Any] = []
        emptied: list[Any] = []
        for thing in _objects(arguments):
            (emptied if is_emptied(module, thing) else found).append(thing)
        self._open[-1] = found, emptied
        if found:
            self._by_call.append((call, [*map(id, found)]))

    def leave(self) -> tuple[int, ...]:
        """The call that began last ends.

        Returns:
            What those of its objects hold that a region lets go of when it ends.
        """
        found, emptied = self._open.pop()
        for thing in found:
            self._contents[id(thing)] = self._storages_of(Reached((thing,)).tensors)
        return self._storages_of(Reached(tuple(emptied)).tensors) if emptied else ()

    def settle(self) -> None:
        """Write down what the objects of each call hold at the end of the forward."""
        for call, things in self._by_call:
            found = {storage for thing in things for storage in self._contents.get(thing, ())}
            call.held = tuple(sorted(found))


def _objects(value: Any) -> Iterator[Any]:
    """What is neither a tensor nor a container, nor a plain value, and can hold tensors."""
    if isinstance(value, _CONTAINERS):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _objects(item)
    elif not isinstance(value, (torch.Tensor, nn.Module, type)) and type(value) not in ATOMS:
        plain = callable(value) or dataclasses.is_dataclass(value)
        if hasattr(value, "__dict__") and not plain:
            yield value
