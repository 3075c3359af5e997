"""Gather what the ranks of a group hold of a value, and what they say of it."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ckpt_pass.offloading.sharding import ShardGroupError


def gather(out: torch.Tensor, own: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Fill ``out`` with the ``own`` of every rank, in order; bytes, each as many.

    By gloo each rank sends its part to all: its own gather would copy the whole once more.

    Raises:
        ShardGroupError: the group does not exchange values of this device.
    """
    if backend_for(own.device, group) != "gloo":
        dist.all_gather_into_tensor(out, own, group=group)
        return
    parts = out.split(own.numel())
    parts[dist.get_rank(group)].copy_(own)
    works = [
        dist.broadcast(part, src=dist.get_global_rank(group, rank), group=group, async_op=True)
        for rank, part in enumerate(parts)
    ]
    for work in works:
        if work is not None:
            work.wait()


def tell(words: list[int], device: torch.device, group: dist.ProcessGroup) -> list[list[int]]:
    """What each rank says, in order: as many numbers of 64 bits from each."""
    own = torch.tensor(words, dtype=torch.int64, device=device)
    out = torch.empty(dist.get_world_size(group) * len(words), dtype=torch.int64, device=device)
    gather(out.view(torch.uint8), own.view(torch.uint8), group)
    found: list[list[int]] = out.view(-1, len(words)).tolist()
    return found


def backend_for(device: torch.device, group: dist.ProcessGroup) -> str:
    """What exchanges a device's values within a group.

    Raises:
        ShardGroupError: nothing does.
    """
    config = dist.get_backend_config(group)
    backends = dict(part.split(":", 1) for part in config.split(",") if ":" in part)
    found = backends.get(device.type, config if ":" not in config else None)
    if found is None:
        raise ShardGroupError(
            f"A value on {device} is to be sharded over a group whose backends are {config}. "
            "Expected one that exchanges values of that device. Make the group with one "
            "('cpu:gloo,cuda:nccl'), or do not shard this value."
        )
    return found
