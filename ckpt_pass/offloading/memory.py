"""Plain host memory as a store: for values of the CPU, for tests, and where nothing else is."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import numpy as np
import torch

from ckpt_pass.offloading.slots import Pool, Slot
from ckpt_pass.offloading.store import Pending
from ckpt_pass.offloading.workers import Job, Worker


class HostMemory:
    """Memory in chunks; not torch's, so that it is no allocation of the step."""

    name = "the host memory for offloading"
    contiguous = False
    powers_of_two = False

    def __init__(self) -> None:
        self._chunks: list[Any] = []

    def grow(self, nbytes: int) -> None:
        """Add a chunk."""
        self._chunks.append(np.empty(nbytes, dtype=np.uint8))

    def at(self, slot: Slot, nbytes: int) -> Any:
        """The bytes of a slot, as an array."""
        return self._chunks[slot.chunk][slot.offset : slot.offset + nbytes]


class HostCarrier:
    """Copies between tensors of the CPU and memory, by two threads.

    Args:
        budget_bytes: the most memory.
        bytes_per_s: no faster than that, each way.
    """

    def __init__(self, budget_bytes: int | None = None, bytes_per_s: float | None = None) -> None:
        self._memory = HostMemory()
        self.pool = Pool(self._memory, budget_bytes)
        self._bytes_per_s = bytes_per_s
        self._start()

    def _start(self) -> None:
        self._process = os.getpid()
        self._out = Worker("ckpt_pass-out", self._bytes_per_s)
        self._back = Worker("ckpt_pass-back", self._bytes_per_s)

    def out(self, source: torch.Tensor, slot: Slot) -> Job:
        """Begin to copy into a slot (:class:`~ckpt_pass.offloading.store.Carrier`)."""
        return self._out.begin(partial(_store, self._memory, slot), source)

    def back(self, slot: Slot, target: torch.Tensor, after: Pending) -> Job:
        """Begin to copy back (:class:`~ckpt_pass.offloading.store.Carrier`).

        Nothing is waited for: what was let go of is there.
        """
        if os.getpid() != self._process:  # forked: memory is as it was, the threads are gone
            self._start()
        return self._back.begin(partial(_load, self._memory, slot), target)


def _store(memory: HostMemory, slot: Slot, source: torch.Tensor) -> None:
    np.copyto(memory.at(slot, source.numel()), source.numpy())


def _load(memory: HostMemory, slot: Slot, target: torch.Tensor) -> None:
    np.copyto(target.numpy(), memory.at(slot, target.numel()))
