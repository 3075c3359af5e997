"""Where values lie: slots in chunks of bytes, by best fit, freed neighbours joined again.

An allocator of our own, because those of memory round up (pinned memory in torch to powers of two),
give nothing back, or cost milliseconds a call; and a file has none.
"""

from __future__ import annotations

import threading
from bisect import insort
from collections import deque
from typing import NamedTuple, Protocol

from ckpt_pass._errors import CkptPassError

ALIGNMENT = 512
#: Chunks are at least this large, and half of what is there already.
CHUNK_BYTES = 64 * 2**20


class StoreFullError(CkptPassError, MemoryError):
    """A value does not fit into what may be used to keep values elsewhere."""


class Slot(NamedTuple):
    """A place for one value."""

    chunk: int
    offset: int
    nbytes: int


class Slots:
    """Free and taken parts of chunks. Not for several threads at once."""

    def __init__(self) -> None:
        self.capacity_bytes = 0
        self.used_bytes = 0
        self._sizes: list[int] = []
        #: Free parts of each chunk, (offset, bytes), in order.
        self._free: list[list[tuple[int, int]]] = []

    def add_chunk(self, nbytes: int) -> None:
        """Add a free chunk, the last one now."""
        self._sizes.append(nbytes)
        self._free.append([(0, nbytes)])
        self.capacity_bytes += nbytes

    def extend(self, nbytes: int) -> None:
        """Make the last chunk larger."""
        end = self._sizes[-1]
        self._sizes[-1] += nbytes
        self.capacity_bytes += nbytes
        self._join(len(self._sizes) - 1, end, nbytes)

    @property
    def tail_bytes(self) -> int:
        """What is free at the end of the last chunk."""
        if not self._sizes or not self._free[-1]:
            return 0
        offset, nbytes = self._free[-1][-1]
        return nbytes if offset + nbytes == self._sizes[-1] else 0

    def take(self, nbytes: int) -> Slot | None:
        """The smallest free part that is large enough, the first of several; ``None`` without."""
        best = min(
            (
                (free, chunk, offset)
                for chunk, parts in enumerate(self._free)
                for offset, free in parts
                if free >= nbytes
            ),
            default=None,
        )
        if best is None:
            return None
        free, chunk, offset = best
        parts = self._free[chunk]
        parts.remove((offset, free))
        if free > nbytes:
            insort(parts, (offset + nbytes, free - nbytes))
        self.used_bytes += nbytes
        return Slot(chunk, offset, nbytes)

    def give(self, slot: Slot) -> None:
        """Make a slot free again."""
        self.used_bytes -= slot.nbytes
        self._join(slot.chunk, slot.offset, slot.nbytes)

    def _join(self, chunk: int, offset: int, nbytes: int) -> None:
        parts = self._free[chunk]
        insort(parts, (offset, nbytes))
        at = parts.index((offset, nbytes))
        if at + 1 < len(parts) and offset + nbytes == parts[at + 1][0]:
            nbytes += parts.pop(at + 1)[1]
        if at and sum(parts[at - 1]) == offset:
            before, more = parts[at - 1]
            parts.pop(at)
            at, offset, nbytes = at - 1, before, more + nbytes
        parts[at] = (offset, nbytes)


class Space(Protocol):
    """What slots lie in: memory in chunks, or a file that grows at its end."""

    #: What it is, for messages.
    name: str
    #: Whether it grows at its end; else each time by a chunk of its own.
    contiguous: bool
    #: Whether chunks of other sizes than powers of two take as much as the next one.
    powers_of_two: bool

    def grow(self, nbytes: int) -> None:
        """Make room for that many bytes more.

        Raises:
            StoreFullError: there is none.
        """
        ...


class Pool:
    """The slots of one space, for all threads.

    Args:
        space: where they lie.
        budget_bytes: the most that it may grow to; no limit where ``None``.
    """

    def __init__(self, space: Space, budget_bytes: int | None) -> None:
        self._space = space
        self._budget_bytes = budget_bytes
        self._slots = Slots()
        self._lock = threading.Lock()
        # Slots come back from finalizers, which run anywhere, also inside of `take`: no lock there.
        self._returned: deque[Slot] = deque()

    @property
    def allocated_bytes(self) -> int:
        """What the space has grown to."""
        return self._slots.capacity_bytes

    @property
    def used_bytes(self) -> int:
        """What is taken, each value rounded up to ``ALIGNMENT``."""
        with self._lock:
            self._drain()
            return self._slots.used_bytes

    def take(self, nbytes: int) -> Slot:
        """A slot for a value.

        Raises:
            StoreFullError: it does not fit.
        """
        rounded = max(-(-nbytes // ALIGNMENT), 1) * ALIGNMENT
        with self._lock:
            self._drain()
            slot = self._slots.take(rounded)
            if slot is None:
                self._grow(rounded, CHUNK_BYTES)
                slot = self._slots.take(rounded)
                assert slot is not None
            return slot

    def give(self, slot: Slot) -> None:
        """A slot is free again; for finalizers, too."""
        self._returned.append(slot)

    def reserve(self, nbytes: int) -> None:
        """Grow to that many bytes at once, where there are fewer.

        Raises:
            StoreFullError: there is no room.
        """
        missing = nbytes - self.allocated_bytes
        if missing > 0:
            with self._lock:
                self._grow(-(-missing // ALIGNMENT) * ALIGNMENT, 0, joined=False)

    def _drain(self) -> None:
        while self._returned:
            self._slots.give(self._returned.popleft())

    def _grow(self, nbytes: int, least: int, joined: bool = True) -> None:
        space, slots = self._space, self._slots
        grows_at_end = space.contiguous and slots.capacity_bytes > 0
        missing = nbytes - (slots.tail_bytes if grows_at_end and joined else 0)
        added = max(missing, least, slots.capacity_bytes // 2 if least else 0)
        if space.powers_of_two and least:
            added = 1 << (added - 1).bit_length()
        if self._budget_bytes is not None:
            room = self._budget_bytes - slots.capacity_bytes
            if missing > room:
                raise StoreFullError(
                    f"A value of {nbytes:,} bytes does not fit into {space.name}: "
                    f"{slots.used_bytes:,} of {self._budget_bytes:,} bytes are taken"
                    f"{_in_pieces(slots, nbytes, self._budget_bytes)}. Expected all that is "
                    "offloaded at one time to fit. Raise host_budget, or offload less."
                )
            added = min(added, room)
        space.grow(added)
        if grows_at_end:
            slots.extend(added)
        else:
            slots.add_chunk(added)


def _in_pieces(slots: Slots, nbytes: int, budget_bytes: int) -> str:
    enough = budget_bytes - slots.used_bytes >= nbytes
    return ", and the rest is in pieces that are too small" if enough else ""
