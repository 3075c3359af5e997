"""A value that all ranks of a group hold alike, kept as a part on each, and gathered again.

Whether they hold it alike is known of a DTensor by its placements. Of a plain tensor nobody knows:
the ranks compare checksums, of the whole value when it was put away, when they gather it.
"""

from __future__ import annotations

import threading
import weakref
import zlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch import autograd, groups, storages
from ckpt_pass.offloading.checksums import checksum
from ckpt_pass.offloading.gathering import backend_for, gather, tell
from ckpt_pass.offloading.layout import is_movable
from ckpt_pass.offloading.sharding import Sharding


class ShardedValueDiffersError(CkptPassError, RuntimeError):
    """Ranks that were to keep a part each of one value held different ones."""


class ShardOrderError(CkptPassError, RuntimeError):
    """Ranks asked for different values at the same time."""


@dataclass(frozen=True, slots=True)
class Lie:
    """How a tensor's elements lie, and how many of them are different places in memory.

    Attributes:
        numel: of these.
        dense: whether they lie without gaps, so that they can be taken in the order of memory.
    """

    numel: int
    dense: bool


def lie_of(tensor: Tensor) -> Lie | None:
    """How a strided tensor lies; ``None`` where elements overlap otherwise than by expansion."""
    count = span = 1
    dense = True
    for step, size in sorted(zip(tensor.stride(), tensor.size(), strict=True)):
        if size > 1 and step:
            if step < span:
                return None
            dense = dense and step == count
            count *= size
            span += (size - 1) * step
    return Lie(count, dense)


def is_shardable(tensor: Tensor, least_bytes: int) -> bool:
    """Whether a tensor has plain values that can be taken apart, and enough of them."""
    if not is_movable(tensor) or not tensor.numel():
        return False
    lie = lie_of(tensor)
    return lie is not None and lie.numel * tensor.element_size() >= max(least_bytes, 1)


def worth_sharding(tensor: Tensor, sharding: Sharding) -> bool:
    """Whether a value is kept in parts: large enough, of one piece, and on ranks that are several.

    Raises:
        ShardGroupError: the group is not there.
    """
    if autograd.is_distributed(tensor):
        ranks = dist.get_process_group_ranks(sharding.found_group())
        alike = groups.is_alike(tensor, ranks)
        return alike and _is_worth(groups.local_part(tensor), sharding)
    return _is_worth(tensor, sharding)


def _is_worth(local: Tensor, sharding: Sharding) -> bool:
    several = is_shardable(local, sharding.min_bytes)
    return several and dist.get_world_size(sharding.found_group()) > 1


class Part:
    """This rank's part of a value.

    Args:
        tensor: the value; one that is :func:`worth_sharding`.
        sharding: over which ranks.
        checked: whether its checksum is needed.

    Raises:
        ShardGroupError: the group is not there, or does not exchange values of this device.
    """

    __slots__ = (
        "__weakref__",
        "_lie",
        "_spec",
        "_storage",
        "_version",
        "checksum",
        "looks",
        "own",
        "sharding",
    )

    def __init__(self, tensor: Tensor, sharding: Sharding, checked: bool) -> None:
        group = sharding.found_group()
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        is_spread = autograd.is_distributed(tensor)
        self._spec = groups.spec_of(tensor) if is_spread else None
        local = groups.local_part(tensor) if is_spread else tensor
        backend_for(local.device, group)
        lie = lie_of(local)
        assert lie is not None
        self._lie, self.sharding = lie, sharding
        self._storage = storages.WeakStorage(local.untyped_storage())
        self._version = storages.version_of(local)
        #: Size, stride and dtype of what the rank has held.
        self.looks = local.size(), local.stride(), local.dtype
        with groups.unseen():
            flat = _in_order(local, lie)
            #: That of the whole value, where it was needed.
            self.checksum = checksum(flat) if checked else None
            own = flat[rank * (each := -(-lie.numel // ranks)) : (rank + 1) * each]
            #: What is kept of it: as many elements on each rank, filled up where there are fewer.
            self.own = flat.new_zeros(each)
            self.own[: own.numel()].copy_(own)

    def is_of(self, tensor: Tensor, sharding: Sharding) -> bool:
        """Whether it is a part of this plain tensor, unchanged since."""
        looks = tensor.size(), tensor.stride(), tensor.dtype
        return (
            self._spec is None
            and (self.sharding, self.looks) == (sharding, looks)
            and tensor.untyped_storage()._cdata == self._storage.cdata
            and not self._storage.expired()
            and storages.version_of(tensor) == self._version != -1
            and (self.checksum is None or self.checksum == _checksum_of(tensor, self._lie))
        )

    def gathered(self, group: dist.ProcessGroup) -> Tensor:
        """The value as it was, without history, in memory of its own."""
        with groups.unseen():
            each, ranks = self.own.numel(), dist.get_world_size(group)
            whole = self.own.new_empty(each * ranks)
            gather(whole.view(torch.uint8), self.own.view(torch.uint8), group)
            value = _lying(whole, self._lie, *self.looks[:2])
        return value if self._spec is None else groups.spread_like(value, self._spec)


class _Lane(threading.local):
    """The parts that one thread holds, by the address of the storage and the place in it."""

    def __init__(self) -> None:
        self.parts: weakref.WeakValueDictionary[tuple[int, int], Part] = (
            weakref.WeakValueDictionary()
        )


_lane = _Lane()


class ShardedValue:
    """A value that is gathered when it is asked for.

    What several regions are given is kept once; each gathers it for itself, as which of them still
    has it may differ between ranks.

    Args:
        tensor: the value; one that is :func:`worth_sharding`.
        sharding: over which ranks, and what is checked.
        where: what it is, for messages; the same on all ranks.
        seen: those of which the ranks have compared checksums; this one is added when they have.

    Raises:
        ShardGroupError: the group is not there, or does not exchange values of this device.
    """

    __slots__ = ("_compares", "_part", "_seen", "_where")

    def __init__(self, tensor: Tensor, sharding: Sharding, where: str, seen: set[str]) -> None:
        self._compares = sharding.check == "always" or where not in seen
        self._where, self._seen = where, seen
        self._part = _part_of(tensor, sharding, self._compares)

    @property
    def nbytes(self) -> int:
        """What this rank keeps of it."""
        return self._part.own.nbytes

    def take(self) -> Tensor:
        """Gather the value: as it was, without history, in memory of its own.

        Every rank of the group has to ask for it, in the same order as for others.

        Raises:
            ShardedValueDiffersError: the ranks held different values; on all of them.
            ShardOrderError: they ask for different ones; on all of them.
            ShardGroupError: the group is not there any more.
        """
        group = self._part.sharding.found_group()
        self._compare(group)
        return self._part.gathered(group)

    def _compare(self, group: dist.ProcessGroup) -> None:
        part = self._part
        size, stride, dtype = part.looks
        looks = _code(f"{tuple(size)} {stride} {dtype}")
        own = [_code(self._where), looks, part.own.nbytes, self._compares, part.checksum or 0]
        with groups.unseen():
            said = tell(own, part.own.device, group)
        if any(other[0] != own[0] for other in said):
            raise ShardOrderError(
                f"This rank gathers {self._where}, and another one of its group of {len(said)} "
                "gathers something else at the same time. Expected every rank to run the same "
                "regions, and their backwards, in the same order. Look for code that depends on "
                "the rank, or shard over a group whose ranks do the same."
            )
        if any(other[1:3] != own[1:3] for other in said):
            raise self._differ(f"of other shapes or dtypes (here {list(size)}, {dtype})")
        if all(other[3] for other in said):
            if any(other[4] != own[4] for other in said):
                raise self._differ(f"their checksums are {[other[4] for other in said]}, by rank")
            self._seen.add(self._where)

    def _differ(self, how: str) -> ShardedValueDiffersError:
        return ShardedValueDiffersError(
            f"Ranks that keep a part each of {self._where} hold different values of it: {how}. "
            "Expected one value that all of them hold alike. Shard over ranks that do (those of "
            "tensor parallelism, not those with data of their own), or keep it whole: a save or "
            "recompute rule before the shard rule, no shard_inputs for this region. What each rank "
            "draws with a seed of its own, or has a slice of, cannot be sharded."
        )


def _part_of(tensor: Tensor, sharding: Sharding, checked: bool) -> Part:
    """A part of a tensor: the one that is there, if it is."""
    if autograd.is_distributed(tensor):
        return Part(tensor, sharding, checked)
    key = tensor.untyped_storage()._cdata, int(tensor.storage_offset())
    part = _lane.parts.get(key)
    has_sum = part is not None and part.checksum is not None
    if part is None or not part.is_of(tensor, sharding) or (checked and not has_sum):
        part = _lane.parts[key] = Part(tensor, sharding, checked)
    return part


def checksum_of(tensor: Tensor) -> int:
    """The checksum of a tensor that is :func:`is_shardable`."""
    lie = lie_of(tensor)
    assert lie is not None
    return _checksum_of(tensor, lie)


def _checksum_of(tensor: Tensor, lie: Lie) -> int:
    with groups.unseen():
        return checksum(_in_order(tensor, lie))


def _code(text: str) -> int:
    return zlib.crc32(text.encode())


def _in_order(tensor: Tensor, lie: Lie) -> Tensor:
    """The different elements in one dimension: in the order of memory where they are dense."""
    if lie.dense:
        return tensor.as_strided((lie.numel,), (1,), tensor.storage_offset())
    return _once(tensor).reshape(-1)


def _once(tensor: Tensor) -> Tensor:
    """A tensor with each of its expanded dimensions cut down to one."""
    for dim, step in enumerate(tensor.stride()):
        if not step and tensor.size(dim) > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _lying(whole: Tensor, lie: Lie, size: Any, stride: Any) -> Tensor:
    """Gathered elements, which may be followed by some that fill up, as a tensor that lies so."""
    if lie.dense:
        return whole.as_strided(size, stride, 0)
    made = whole.new_empty_strided(size, stride)
    once = _once(made)
    once.copy_(whole[: lie.numel].view(once.size()))
    return made
