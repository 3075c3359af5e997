"""Process groups by their names, and tensors that lie over several ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor


def name_of(group: Any) -> str | None:
    """The name that torch has for a group; ``None`` for that of all ranks."""
    is_world = dist.is_initialized() and group is dist.group.WORLD
    return None if is_world else str(group.group_name)


def named(name: str | None) -> dist.ProcessGroup | None:
    """The group of that name, all ranks where ``None``; ``None`` where there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    if name is None:
        return dist.group.WORLD
    from torch._C._distributed_c10d import _resolve_process_group

    try:
        return _resolve_process_group(cast(Any, name))
    except (RuntimeError, ValueError):  # it never was there, or is there no more
        return None


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """Inside, no mode of dispatch sees what runs, and autograd records nothing."""
    with torch._C._DisableTorchDispatch(), torch.no_grad():
        yield


def local_part(tensor: Any) -> Tensor:
    """What a rank has of a DTensor, without history."""
    with torch.no_grad():
        found: Tensor = tensor.to_local()
        return found.detach()


def spread_like(local: Tensor, spec: Any) -> Tensor:
    """A DTensor of a rank's part, that lies as ``spec`` (:func:`spec_of`) says."""
    from torch.distributed.tensor import DTensor

    mesh, placements, shape, stride = spec
    with torch.no_grad():
        made: Tensor = DTensor.from_local(
            local, mesh, placements, run_check=False, shape=shape, stride=stride
        )
        return made.detach()


def spec_of(tensor: Any) -> Any:
    """How a DTensor lies over its mesh."""
    return tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride()


def is_alike(tensor: Any, ranks: list[int]) -> bool:
    """Whether a DTensor's placements say that these ranks hold the same part of it.

    They do where the ranks' places in the mesh differ only along dimensions that it is replicated
    over.
    """
    mesh, placements = tensor.device_mesh, tensor.placements
    places = []
    for rank in ranks:
        found = (mesh.mesh == rank).nonzero().tolist()
        if len(found) != 1:
            return False
        places.append(
            [
                index
                for index, placement in zip(found[0], placements, strict=True)
                if not placement.is_replicate()
            ]
        )
    return all(place == places[0] for place in places)
