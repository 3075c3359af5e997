"""Make stores, and find the one that all regions with the same options share."""

from __future__ import annotations

import functools
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch

from ckpt_pass.offloading.disk import FileCarrier
from ckpt_pass.offloading.layout import DEVICES
from ckpt_pass.offloading.memory import HostCarrier
from ckpt_pass.offloading.options import InvalidOffloadError, Offload
from ckpt_pass.offloading.pinned import PinnedCarrier
from ckpt_pass.offloading.store import PooledStore, Store

#: What users may pass: options, or a store of their own.
OffloadLike: TypeAlias = "Offload | Store"


def as_offload(offload: OffloadLike | bool | None) -> OffloadLike | None:
    """Where values may be moved to; ``None`` for nowhere.

    Args:
        offload: ``True`` for the host, options, a store, ``False`` or ``None``.

    Raises:
        InvalidOffloadError: it is none of these.
    """
    if offload is None or offload is False:
        return None
    if offload is True:
        return Offload()
    if isinstance(offload, (Offload, Store)):
        return offload
    raise InvalidOffloadError(
        f"Got offload={offload!r}, expected True, False, Offload(to='host' or 'disk', ...), or a "
        "store."
    )


def host_store(budget_bytes: int | None = None, bytes_per_s: float | None = None) -> PooledStore:
    """Plain host memory, for values of the CPU.

    Args:
        budget_bytes: the most memory; no limit where ``None``.
        bytes_per_s: no faster than that, each way: a link of a known rate, for tests.
    """
    return PooledStore(partial(HostCarrier, budget_bytes, bytes_per_s))


def pinned_store(device: torch.device, budget_bytes: int | None = None) -> PooledStore:
    """Pinned host memory, for values of a CUDA device.

    Args:
        device: the device.
        budget_bytes: the most memory; no limit where ``None``.
    """
    return PooledStore(partial(PinnedCarrier, device, budget_bytes))


def disk_store(
    folder: str | Path | None = None,
    budget_bytes: int | None = None,
    bytes_per_s: float | None = None,
) -> PooledStore:
    """A file without a name, for values of the CPU or of a CUDA device.

    Args:
        folder: where it is; one of the user's own for temporary files where ``None``.
        budget_bytes: its largest size; no limit where ``None``.
        bytes_per_s: no faster than that, each way: a link of a known rate, for tests.

    Raises:
        StoreFolderError: no file can be opened there.
    """
    return PooledStore(partial(FileCarrier, folder, budget_bytes, bytes_per_s))


def open_store(offload: Offload, device: torch.device) -> PooledStore:
    """A new store as the options say, for values of a device.

    Raises:
        InvalidOffloadError: values of such a device cannot be moved.
        StoreFolderError: no file can be opened.
    """
    if device.type not in DEVICES:
        raise InvalidOffloadError(
            f"Got values on {device} to be offloaded, expected them on {' or '.join(DEVICES)}. "
            "Leave offloading out on this device."
        )
    if offload.to == "disk":
        return disk_store(offload.folder, offload.host_budget_bytes)
    if device.type == "cuda":
        return pinned_store(device, offload.host_budget_bytes)
    return host_store(offload.host_budget_bytes)


@functools.lru_cache(maxsize=16)
def _shared(offload: Offload, device: torch.device) -> PooledStore:
    return open_store(offload, device)


def store_for(offload: OffloadLike, device: torch.device) -> Store:
    """The store for values of a device; of options it is one for all that are equal.

    It stays, as a cache does: its memory is used again in the next step.
    :func:`close_shared_stores` lets go of it.

    Raises:
        InvalidOffloadError: values of such a device cannot be moved.
        StoreFolderError: no file can be opened.
    """
    if not isinstance(offload, Offload):
        return offload
    # What is planned with, and by whom, makes no other store.
    same = replace(offload, d2h_bytes_per_s=None, h2d_bytes_per_s=None, min_bytes=0)
    return _shared(same, device)


def close_shared_stores() -> None:
    """Let go of the memory and the files of stores that were found by their options.

    What is in use stays until its tickets are gone.
    """
    _shared.cache_clear()
