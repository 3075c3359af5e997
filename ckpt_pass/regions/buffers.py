"""Buffers that a region moves: running statistics, and copies that stand in for tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import _disable_current_modes

from ckpt_pass.regions.holders import has_memory


def running_buffers(owners: Iterable[nn.Module]) -> Iterator[torch.Tensor]:
    """The buffers that normalisations in training update."""
    for module in (module for owner in owners for module in owner.modules()):
        if isinstance(module, _NormBase) and module.training:
            yield from filter(has_memory, module.buffers(recurse=False))


def has_statistics(module: nn.Module) -> bool:
    """Whether a normalisation in a module has running statistics."""
    norms = (inner for inner in module.modules() if isinstance(inner, _NormBase))
    return any(norm.track_running_stats for norm in norms)


def copy_of(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """A copy of a storage."""
    with _disable_current_modes():  # no op of the region
        made: torch.UntypedStorage = storage.clone()
    return made


def alias_like(
    tensor: torch.Tensor, start: torch.Tensor, storage: torch.UntypedStorage
) -> torch.Tensor:
    """A leaf like a tensor, over another storage, which it looks at as ``start`` does."""
    with torch.no_grad():
        made = torch.empty(0, dtype=start.dtype, device=start.device)
        made.set_(storage, start.storage_offset(), start.size(), start.stride())
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(made, tensor.requires_grad)
    return made.requires_grad_(tensor.requires_grad)
