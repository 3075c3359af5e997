"""Pinned host memory as a store for values of a CUDA device: two side streams, one pool.

Who waits is the compute stream, never the caller. A tensor's memory goes back to torch's allocator
after the compute stream was made to wait for the copy out, so that whatever gets it next, on that
stream, comes after the copy; the same holds for memory that a copy back was filling when nobody
wanted it any more.
"""

from __future__ import annotations

import torch

from ckpt_pass._torch import storages
from ckpt_pass.offloading.slots import Pool, Slot
from ckpt_pass.offloading.store import Pending


class PinnedMemory:
    """Pinned memory in chunks of powers of two, as torch's allocator would round them up anyway."""

    name = "the pinned host memory for offloading"
    contiguous = False
    powers_of_two = True

    def __init__(self) -> None:
        self._chunks: list[torch.Tensor] = []

    def grow(self, nbytes: int) -> None:
        """Add a chunk."""
        self._chunks.append(storages.pinned_bytes(nbytes))

    def at(self, slot: Slot, nbytes: int) -> torch.Tensor:
        """The bytes of a slot."""
        return storages.part_of(self._chunks[slot.chunk], slot.offset, nbytes)


class StreamCopy:
    """A copy on a side stream.

    Args:
        done: when it is finished.
        compute: the stream that the tensor's memory belongs to.
    """

    __slots__ = ("_compute", "done")

    def __init__(self, done: torch.cuda.Event, compute: torch.cuda.Stream) -> None:
        self.done = done
        self._compute = compute

    def wait(self) -> None:
        """Let the compute stream, and the current one, go on when it is finished."""
        self._compute.wait_event(self.done)
        current = torch.cuda.current_stream(self._compute.device)
        if current != self._compute:
            current.wait_event(self.done)

    def abandon(self) -> None:
        """Let the memory be used again only after the copy."""
        self._compute.wait_event(self.done)


class PinnedCarrier:
    """Copies between tensors of a CUDA device and pinned memory.

    Args:
        device: the device.
        budget_bytes: the most pinned memory.

    Attributes:
        out_stream, back_stream: where the copies run.
    """

    def __init__(self, device: torch.device, budget_bytes: int | None = None) -> None:
        self._memory = PinnedMemory()
        self.pool = Pool(self._memory, budget_bytes)
        self.out_stream = torch.cuda.Stream(device)
        self.back_stream = torch.cuda.Stream(device)

    def out(self, source: torch.Tensor, slot: Slot) -> StreamCopy:
        """Begin to copy into a slot (:class:`~ckpt_pass.offloading.store.Carrier`)."""
        place = self._memory.at(slot, source.numel())
        return _on_side(self.out_stream, place, source, source.device)

    def back(self, slot: Slot, target: torch.Tensor, after: Pending) -> StreamCopy:
        """Begin to copy back (:class:`~ckpt_pass.offloading.store.Carrier`).

        The target's memory may have been another tensor's that the compute stream still reads: the
        copy begins after all that this has been given until now.
        """
        if isinstance(after, StreamCopy):
            self.back_stream.wait_event(after.done)
        place = self._memory.at(slot, target.numel())
        return _on_side(self.back_stream, target, place, target.device)


def _on_side(
    side: torch.cuda.Stream, target: torch.Tensor, source: torch.Tensor, device: torch.device
) -> StreamCopy:
    compute = torch.cuda.current_stream(device)  # before the side stream is the current one
    side.wait_event(compute.record_event())
    with torch.cuda.stream(side):
        storages.begin_copy(target, source)
    return StreamCopy(side.record_event(), compute)
