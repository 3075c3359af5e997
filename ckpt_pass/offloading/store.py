"""Put a value away, let go of its memory, have it back: one interface, whatever lies behind.

What a store is made of is its :class:`Carrier`, which belongs to one process: threads, streams and
the offsets in a file do not outlive a fork. A store makes a new one in a new process.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch import storages
from ckpt_pass.offloading.layout import Layout, check_movable
from ckpt_pass.offloading.slots import Pool, Slot


class MovedValueChangedError(CkptPassError, RuntimeError):
    """A value was changed in place while it was on its way to a store; torch: ``RuntimeError``."""


def changed_on_its_way(size: Sequence[int], dtype: torch.dtype) -> MovedValueChangedError:
    """What is said of a tensor whose values are lost."""
    return MovedValueChangedError(
        f"A tensor of shape {list(size)} and {dtype} was changed in place after it was offloaded "
        "and before its copy was finished, so that its values are lost. Expected no change until "
        "the backward. Clone it before the in-place op, or do not offload it."
    )


class Pending(Protocol):
    """A copy that was begun."""

    def wait(self) -> None:
        """Go on when it is finished: this thread, or what its stream does from here on.

        Raises:
            StoreWriteError, StoreReadError: it has failed.
        """
        ...

    def abandon(self) -> None:
        """Nobody will wait: its slot, and the tensor's memory, may be used again from here on."""
        ...


class Carrier(Protocol):
    """What moves bytes to and fro, in one process."""

    pool: Pool

    def out(self, source: torch.Tensor, slot: Slot) -> Pending:
        """Begin to copy the bytes of ``source`` into a slot."""
        ...

    def back(self, slot: Slot, target: torch.Tensor, after: Pending) -> Pending:
        """Begin to copy a slot into the bytes of ``target``; not before ``after`` is finished.

        Raises:
            ForkedStoreError: the slot was filled in another process, and cannot be read in this.
        """
        ...


class _Held:
    """What a ticket holds; its finalizer lets go of it."""

    __slots__ = ("carrier", "coming", "out", "slot", "source")

    def __init__(self, carrier: Carrier, source: torch.Tensor, slot: Slot) -> None:
        self.carrier = carrier
        self.slot = slot
        self.source: torch.Tensor | None = source
        self.out: Pending | None = None
        #: Copies back that were begun: the bytes that they fill, and when they are there.
        self.coming: list[tuple[torch.Tensor, Pending]] = []

    def let_go(self) -> None:
        """Give everything back, whatever is still running."""
        if self.out is not None and self.source is not None:
            self.out.abandon()
        for _, pending in self.coming:
            pending.abandon()
        self.source = None
        self.coming.clear()
        self.carrier.pool.give(self.slot)


class Ticket:
    """A value in a store. Its place there is taken as long as the ticket lives.

    What moves is the tensor's whole storage, so that views move with what they are views of.
    """

    __slots__ = (
        "__weakref__",
        "_changed",
        "_closed",
        "_held",
        "_latest",
        "_layout",
        "_process",
        "_storage",
        "_version",
        "was_taken",
    )

    def __init__(self, carrier: Carrier, tensor: torch.Tensor) -> None:
        self._layout = Layout.of(tensor)
        alias = storages.detached(tensor)
        self._version = storages.version_of(alias)
        self._changed = self._closed = False
        self._process = os.getpid()
        self._storage = storages.WeakStorage(tensor.untyped_storage())
        #: What was handed out to be shared, as long as somebody holds it.
        self._latest: storages.WeakStorage | None = None
        #: Whether it was handed out before: who asks again is not expected, and not fetched for.
        self.was_taken = False
        self._held = _Held(carrier, alias, carrier.pool.take(self._layout.storage_bytes))
        weakref.finalize(self, self._held.let_go).atexit = False
        self._held.out = carrier.out(storages.bytes_of(alias), self._held.slot)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's storage."""
        return self._layout.storage_bytes

    @property
    def is_anothers(self) -> bool:
        """Whether it was put away in another process, which this one was forked from."""
        return os.getpid() != self._process

    @property
    def released(self) -> bool:
        """Whether the tensor's memory was let go of."""
        return self._held.source is None

    def release(self) -> None:
        """Wait until the value is in the store, then let go of the tensor's memory; once.

        On a CUDA device it is the current stream that waits, and not the caller.

        Raises:
            StoreWriteError: it could not be written.
        """
        held = self._held
        source = held.source
        if source is None:
            return
        assert held.out is not None
        held.out.wait()
        # Looked at after the wait: nobody can have written to what was on its way, unseen.
        self._changed = storages.version_of(source) != self._version
        held.source = None

    def recount(self) -> None:
        """Take the tensor's version as it is now, after a change that changed no value."""
        if self._held.source is None:
            self._changed = False
        else:
            self._version = storages.version_of(self._held.source)

    def close(self) -> None:
        """Stand for no other tensor from now on: its storage is about to be written to."""
        self._closed = True

    def fetch(self) -> None:
        """Take memory on the tensor's device now, and begin to copy the value back; once.

        Nothing happens where the tensor's own memory is still there.

        Raises:
            ForkedStoreError: it was put away in another process.
        """
        if self._held.source is None and not self._held.coming:
            self._held.coming.append(self._begin())

    @property
    def storage_address(self) -> int:
        """Of the storage that was put away; another's once that is gone and memory let go of."""
        return int(self._storage.cdata)

    def is_of(self, tensor: torch.Tensor) -> bool:
        """Whether it is this tensor's storage, unchanged since, that was put away.

        Asked of tensors with one version counter only (:func:`~.layout.counted_part`).
        """
        return (
            not (self._closed or self.is_anothers)
            and tensor.untyped_storage()._cdata == self._storage.cdata
            and not self._storage.expired()
            and tensor.untyped_storage().nbytes() == self._layout.storage_bytes
            and storages.version_of(tensor) == self._version
        )

    def take(self, layout: Layout | None = None, shared: bool = False) -> torch.Tensor:
        """Wait for the value, and hand it out: as the tensor was, without autograd history.

        Every call gives a tensor with memory of its own, that before :meth:`release` excepted.

        Args:
            layout: of another tensor in the same storage, which is handed out instead.
            shared: whether nobody will write to it, so that it may be what an earlier call with
                this argument gave, if that is there still.

        Raises:
            MovedValueChangedError: the tensor was changed in place before it was in the store.
            StoreReadError: it could not be read.
            ForkedStoreError: it was put away in another process.
        """
        source = self._held.source
        changed = source is not None and storages.version_of(source) != self._version
        if changed or self._changed:
            raise changed_on_its_way(self._layout.size, self._layout.dtype)
        self.was_taken = True
        looks = self._layout if layout is None else layout
        if source is not None:
            whole = storages.bytes_of(source)
        else:
            found = self._shared() if shared else None
            whole = self._fetched() if found is None else found
            if shared:
                self._latest = storages.WeakStorage(whole.untyped_storage())
        return storages.viewed(whole, looks.dtype, looks.offset, looks.size, looks.stride)

    def _fetched(self) -> torch.Tensor:
        try:
            data, pending = self._held.coming.pop()
        except IndexError:
            data, pending = self._begin()
        pending.wait()
        return data

    def _shared(self) -> torch.Tensor | None:
        return None if self._latest is None else storages.bytes_again(self._latest)

    def _begin(self) -> tuple[torch.Tensor, Pending]:
        held = self._held
        assert held.out is not None
        data = storages.new_bytes(self._layout.storage_bytes, self._layout.device)
        return data, held.carrier.back(held.slot, data, held.out)


@runtime_checkable
class Store(Protocol):
    """Where values are put."""

    def put(self, tensor: torch.Tensor) -> Ticket:
        """Begin to copy a tensor's storage into the store.

        Until :meth:`Ticket.release` the tensor must not be changed in place, and its memory stays.

        Raises:
            StoreFullError: it does not fit.
            UnmovableTensorError: it is no plain tensor.
        """
        ...

    def reserve(self, nbytes: int) -> None:
        """Make room for so many bytes at once, where there is less.

        Raises:
            StoreFullError: there is none.
        """
        ...

    @property
    def allocated_bytes(self) -> int:
        """What the store has taken: of host memory, or of the disk."""
        ...

    @property
    def used_bytes(self) -> int:
        """How much of that values take."""
        ...


class PooledStore:
    """A store around a carrier; made anew in a process that was forked, and when it is copied.

    Args:
        make: makes the carrier.
    """

    def __init__(self, make: Callable[[], Carrier]) -> None:
        self._make = make
        self._carrier = make()
        self._process = os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        return PooledStore, (self._make,)

    @property
    def carrier(self) -> Carrier:
        """What moves the bytes in this process."""
        if os.getpid() != self._process:
            self._carrier, self._process = self._make(), os.getpid()
        return self._carrier

    def put(self, tensor: torch.Tensor) -> Ticket:
        """Begin to copy a tensor's storage into the store (:class:`Store`).

        Raises:
            StoreFullError: it does not fit.
            UnmovableTensorError: it is no plain tensor.
        """
        check_movable(tensor)
        return Ticket(self.carrier, tensor)

    def reserve(self, nbytes: int) -> None:
        """Make room for so many bytes at once (:class:`Store`).

        Raises:
            StoreFullError: there is none.
        """
        self.carrier.pool.reserve(nbytes)

    @property
    def allocated_bytes(self) -> int:
        """What the store has taken (:class:`Store`)."""
        return self.carrier.pool.allocated_bytes

    @property
    def used_bytes(self) -> int:
        """How much of that values take (:class:`Store`)."""
        return self.carrier.pool.used_bytes
