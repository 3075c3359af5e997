"""What a user says about sharding: over which ranks, from which size on, and what is checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch.distributed as dist

from ckpt_pass._errors import CkptPassError, nearest
from ckpt_pass._torch import groups

CHECKS = ("always", "first")
ARGUMENTS = ("all", "first")


class InvalidShardingError(CkptPassError, ValueError):
    """Options for sharding that make no sense."""


class ShardGroupError(CkptPassError, RuntimeError):
    """The group that values are sharded over is not there, or cannot exchange them."""


@dataclass(frozen=True)
class Sharding:
    """Keep a part of a value on each rank that holds it alike; a frozen value.

    Each of N ranks keeps one N-th of the elements, rounded up, in the order in which they lie in
    memory; the ranks gather the whole when the backward asks for it.

    Attributes:
        group: the ranks: a process group, a device mesh of one dimension, or the name of a group;
            all ranks where ``None``. Kept as the name.
        min_bytes: smaller values are kept whole.
        check: when the ranks compare checksums of what each of them has held: ``"always"``, or
            ``"first"`` for the first run of each region's value alone.
        arguments: of a region's arguments, ``"all"`` activations or the ``"first"`` tensor alone.
        bytes_per_s, latency_s: what a gather takes, for planning: bytes that come from other ranks
            in a second, and the seconds of one that is small; measured where ``None``.

    Raises:
        InvalidShardingError: a value that makes no sense.
        ShardGroupError: this rank does not belong to the group.
    """

    group: Any = None
    min_bytes: int = 1024
    check: str = "always"
    arguments: str = "all"
    bytes_per_s: float | None = None
    latency_s: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "group", _name_of(self.group))
        for name, known in (("check", CHECKS), ("arguments", ARGUMENTS)):
            value = getattr(self, name)
            if value not in known:
                raise InvalidShardingError(
                    f"Got {name}={value!r}, expected one of {', '.join(known)}."
                    f"{nearest(str(value), known)}"
                )
        least = self.min_bytes
        if not isinstance(least, int) or isinstance(least, bool) or least < 0:
            raise InvalidShardingError(
                f"Got min_bytes={least!r}, expected a number of bytes, 0 or more."
            )

        for name, lowest in (("bytes_per_s", 1e-9), ("latency_s", 0.0)):
            rate = getattr(self, name)
            if rate is not None and not (isinstance(rate, (int, float)) and rate >= lowest):
                raise InvalidShardingError(
                    f"Got {name}={rate!r}, expected a positive number, or None to have it measured."
                )

    def __str__(self) -> str:
        over = "all ranks" if self.group is None else f"group {self.group}"
        return f"shard over {over}"

    def found_group(self) -> dist.ProcessGroup:
        """The group.

        Raises:
            ShardGroupError: it is not there.
        """
        group = groups.named(self.group)
        if group is None:
            what = "all ranks" if self.group is None else f"the group {self.group!r}"
            raise ShardGroupError(
                f"Values are to be sharded over {what}, but torch.distributed has no such process "
                "group now. Expected init_process_group, and new_group where a group is named, "
                "before the forward of the first region. Make the group first, or do not shard."
            )
        return group


#: What users may pass: options, or the group alone; ``True`` stands for all ranks.
ShardLike: TypeAlias = "Sharding | dist.ProcessGroup | dist.device_mesh.DeviceMesh | str | bool"


def as_sharding(given: ShardLike | None) -> Sharding | None:
    """The options that a user means; ``None`` where nothing is to be sharded.

    Raises:
        InvalidShardingError: it is no group.
        ShardGroupError: this rank does not belong to the group.
    """
    if given is None or given is False:
        return None
    if isinstance(given, Sharding):
        return given
    return Sharding() if given is True else Sharding(given)


def _name_of(group: Any) -> str | None:
    if group is None or isinstance(group, str):
        return group
    if dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ShardGroupError(
            "This rank does not belong to the group that values are to be sharded over. Expected "
            "each rank to name a group of its own: shard on the group's ranks alone."
        )
    if type(group).__name__ == "DeviceMesh":
        if group.ndim != 1:
            raise InvalidShardingError(
                f"Got a device mesh of {group.ndim} dimensions to shard over, expected one "
                f"dimension: mesh[name], with one of {group.mesh_dim_names}."
            )
        group = group.get_group()
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise InvalidShardingError(
            f"Got {group!r} of type {type(group).__name__} to shard over, expected a process "
            "group, a device mesh of one dimension, the name of a group, or None for all ranks."
        )
    return groups.name_of(group)
