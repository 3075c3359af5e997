"""How fast the link of this machine is: measured once, with copies as a step makes them."""

from __future__ import annotations

import functools
import statistics
import time

import torch

from ckpt_pass.offloading.options import Offload
from ckpt_pass.offloading.slots import StoreFullError
from ckpt_pass.offloading.store import Store
from ckpt_pass.offloading.stores import open_store

#: Bytes of a copy that is timed: long against what begins it, short enough for a small machine.
SAMPLE_BYTES = 32 * 2**20
#: ... to and from an accelerator: on an H100, of whose link copies of 236 MiB use 55 GB/s, what
#: begins a copy and waits for it takes 0.2 ms; with 32 MiB the rates came out as 41 and 44 GB/s.
ACCELERATOR_SAMPLE_BYTES = 256 * 2**20
SAMPLES = 5
_PAGE = 4096


def measured_rates(offload: Offload, device: torch.device | str) -> tuple[float, float]:
    """Bytes per second out to the store and back; what ``offload`` says itself is not measured.

    Medians of five copies of 32 MiB (256 to and from an accelerator), after one that is not
    counted; measured once in a process for each target, folder and device. Of a disk the system's
    cache of pages is a part, as in a step.

    Args:
        offload: where values go.
        device: where they are.

    Raises:
        InvalidOffloadError: values of such a device cannot be moved.
        StoreFolderError, StoreFullError: nothing can be kept there.
    """
    out, back = offload.d2h_bytes_per_s, offload.h2d_bytes_per_s
    if out is None or back is None:
        measured = _measured(Offload(to=offload.to, folder=offload.folder), _indexed(device))
        out, back = out or measured[0], back or measured[1]
    return float(out), float(back)


def _indexed(device: torch.device | str) -> torch.device:
    found = torch.device(device)
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return found


@functools.lru_cache(maxsize=16)
def _measured(offload: Offload, device: torch.device) -> tuple[float, float]:
    return rates_of(open_store(offload, device), device)


def sample_bytes(device: torch.device) -> int:
    """Bytes of a copy that is timed."""
    return SAMPLE_BYTES if device.type == "cpu" else ACCELERATOR_SAMPLE_BYTES


def rates_of(store: Store, device: torch.device) -> tuple[float, float]:
    """Bytes per second out to a store and back, measured now; of a small store with less.

    Raises:
        StoreFullError: a page does not fit.
    """
    nbytes = sample_bytes(device)
    while nbytes > _PAGE and not _fits(store, nbytes):
        nbytes //= 2
    data = torch.ones(nbytes, dtype=torch.uint8, device=device)
    times = [_time_s(store, data) for _ in range(SAMPLES + 1)][1:]
    out_s, back_s = (statistics.median(column) for column in zip(*times, strict=True))
    return nbytes / out_s, nbytes / back_s


def _fits(store: Store, nbytes: int) -> bool:
    try:
        store.reserve(nbytes)
    except StoreFullError:
        return False
    return True


def _time_s(store: Store, data: torch.Tensor) -> tuple[float, float]:
    """Seconds of one copy out and one back."""
    moments = [_now(data.device)]
    ticket = store.put(data)
    ticket.release()
    moments.append(_now(data.device))
    ticket.take()
    moments.append(_now(data.device))
    return moments[1] - moments[0], moments[2] - moments[1]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
