"""A file as a store: values really leave memory, on a machine without an accelerator, too.

Positional reads and writes, by one thread each way, which let other threads run meanwhile. Values
of a CUDA device go through a piece of pinned memory of each thread's own.
"""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch import storages
from ckpt_pass.offloading.files import open_unnamed
from ckpt_pass.offloading.slots import Pool, Slot, StoreFullError
from ckpt_pass.offloading.store import Pending
from ckpt_pass.offloading.workers import ForkedStoreError, Job, Worker

#: No room on the disk, for the user, or for a file of that size.
_NO_ROOM = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
_UNSUPPORTED = frozenset((errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS))
STAGING_BYTES = 16 * 2**20


class StoreWriteError(CkptPassError, OSError):
    """A value could not be written."""


class StoreReadError(CkptPassError, OSError):
    """A value could not be read."""


class SlabFile:
    """A file without a name that grows at its end."""

    contiguous = True
    powers_of_two = False

    def __init__(self, folder: str | Path | None) -> None:
        self.fd = open_unnamed(folder)
        self._closes = weakref.finalize(self, os.close, self.fd)
        where = "a folder for temporary files" if folder is None else str(folder)
        self.name = f"the file for offloading (in {where})"
        self._nbytes = 0

    def grow(self, nbytes: int) -> None:
        """Have the disk set room aside.

        Raises:
            StoreFullError: it has none.
        """
        try:
            self._allocate(nbytes)
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise StoreFullError(
                    f"There is no room for {nbytes:,} bytes more in {self.name}, which has "
                    f"{self._nbytes:,} ({error.strerror}). Expected the disk to hold all that is "
                    "offloaded at one time. Name a folder on a larger one, or offload less."
                ) from error
            raise StoreWriteError(
                f"{self.name} cannot grow by {nbytes:,} bytes: {error.strerror}. Expected a file "
                "system that can be written to. Name another folder: Offload(folder=...)."
            ) from error
        self._nbytes += nbytes

    def _allocate(self, nbytes: int) -> None:
        if hasattr(os, "posix_fallocate"):
            try:
                return os.posix_fallocate(self.fd, self._nbytes, nbytes)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
        return os.ftruncate(self.fd, self._nbytes + nbytes)

    def write(self, offset: int, data: Any) -> None:
        """Write all of a buffer.

        Raises:
            StoreWriteError: it cannot be written.
        """
        rest = memoryview(data).cast("B")
        try:
            while rest:
                written = os.pwrite(self.fd, rest, offset)
                offset, rest = offset + written, rest[written:]
        except OSError as error:
            raise StoreWriteError(
                f"{len(rest):,} bytes cannot be written to {self.name}: {error.strerror}. Expected "
                "a disk with room that works. Name another folder: Offload(folder=...)."
            ) from error

    def read(self, offset: int, data: Any) -> None:
        """Fill all of a buffer.

        Raises:
            StoreReadError: it cannot be read, or is not there any more.
        """
        rest = memoryview(data).cast("B")
        try:
            while rest:
                found = os.preadv(self.fd, [rest], offset)
                if not found:
                    raise StoreReadError(
                        f"{len(rest):,} bytes are missing at the end of {self.name}: somebody has "
                        "cut it. Expected it to be left alone. Run the step again."
                    )
                offset, rest = offset + found, rest[found:]
        except OSError as error:
            if isinstance(error, StoreReadError):
                raise
            raise StoreReadError(
                f"{len(rest):,} bytes cannot be read from {self.name}: {error.strerror}. Expected "
                "a disk that works. Name another folder: Offload(folder=...)."
            ) from error


class FileCarrier:
    """Copies between tensors and a file.

    Args:
        folder: where the file is.
        budget_bytes: its largest size.
        bytes_per_s: no faster than that, each way.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        budget_bytes: int | None = None,
        bytes_per_s: float | None = None,
    ) -> None:
        self._file = SlabFile(folder)
        self.pool = Pool(self._file, budget_bytes)
        self._out = Worker("ckpt_pass-write", bytes_per_s)
        self._back = Worker("ckpt_pass-read", bytes_per_s)
        self._process = os.getpid()
        self._out_staging, self._back_staging = _Staging(), _Staging()

    @property
    def fd(self) -> int:
        """The file's descriptor."""
        return self._file.fd

    def out(self, source: torch.Tensor, slot: Slot) -> Job:
        """Begin to write (:class:`~ckpt_pass.offloading.store.Carrier`)."""
        write: Callable[[torch.Tensor], None] = partial(_write, self._file, slot)
        if source.is_cuda:
            write = self._out_staging.writing(self._file, slot, source.device)
        return self._out.begin(write, source)

    def back(self, slot: Slot, target: torch.Tensor, after: Pending) -> Job:
        """Begin to read (:class:`~ckpt_pass.offloading.store.Carrier`).

        Raises:
            ForkedStoreError: the slot was filled in another process.
        """
        if os.getpid() != self._process:
            raise ForkedStoreError(
                f"A value in {self._file.name} was put there by process {self._process} and is "
                f"needed by process {os.getpid()}, which was forked from it. Expected the backward "
                "in the process that ran the forward. Fork before the forward, or offload to the "
                "host."
            )
        read: Callable[[torch.Tensor], None] = partial(_read, self._file, slot)
        if target.is_cuda:
            read = self._back_staging.reading(self._file, slot, target.device)
        return self._back.begin(read, target)


def _write(file: SlabFile, slot: Slot, source: torch.Tensor) -> None:
    file.write(slot.offset, source.numpy())


def _read(file: SlabFile, slot: Slot, target: torch.Tensor) -> None:
    file.read(slot.offset, target.numpy())


class _Staging:
    """Pinned memory between a CUDA device and a file; used by one thread."""

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None
        self._stream: torch.cuda.Stream | None = None

    def writing(
        self, file: SlabFile, slot: Slot, device: torch.device
    ) -> Callable[[torch.Tensor], None]:
        ready = torch.cuda.current_stream(device).record_event()

        def write(source: torch.Tensor) -> None:
            for stream, memory, start, piece in self._pieces(source, ready):
                memory.copy_(piece, non_blocking=True)
                stream.synchronize()
                file.write(slot.offset + start, memory.numpy())

        return write

    def reading(
        self, file: SlabFile, slot: Slot, device: torch.device
    ) -> Callable[[torch.Tensor], None]:
        ready = torch.cuda.current_stream(device).record_event()

        def read(target: torch.Tensor) -> None:
            for stream, memory, start, piece in self._pieces(target, ready):
                file.read(slot.offset + start, memory.numpy())
                piece.copy_(memory, non_blocking=True)
                stream.synchronize()

        return read

    def _pieces(
        self, data: torch.Tensor, ready: torch.cuda.Event
    ) -> Iterator[tuple[torch.cuda.Stream, torch.Tensor, int, torch.Tensor]]:
        if self._memory is None or self._stream is None:
            self._memory = storages.pinned_bytes(STAGING_BYTES)
            self._stream = torch.cuda.Stream(data.device)
        self._stream.wait_event(ready)
        with torch.cuda.stream(self._stream), torch.no_grad():
            for start in range(0, data.numel(), STAGING_BYTES):
                piece = data[start : start + STAGING_BYTES]
                yield self._stream, self._memory[: piece.numel()], start, piece
