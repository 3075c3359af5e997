"""Put values away with a bounded number on their way, and have them back ahead of their use.

A window belongs to one run of something: a region, a whole forward. What it does depends on the
order of the values alone, never on how fast the link is, so that every step is like the one before.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from dataclasses import dataclass

import torch

from ckpt_pass.offloading.layout import Layout, Part, counted_part, is_movable
from ckpt_pass.offloading.options import Offload
from ckpt_pass.offloading.store import Ticket
from ckpt_pass.offloading.stores import OffloadLike, store_for

#: How many values are fetched ahead of the one that is needed.
AHEAD = 2


@dataclass(frozen=True, slots=True)
class Moved:
    """A tensor whose storage was put away: a ticket, and how the tensor lies in the storage."""

    ticket: Ticket
    layout: Layout

    def take(self, shared: bool = False) -> torch.Tensor:
        """The tensor as it was (:meth:`~ckpt_pass.offloading.store.Ticket.take`)."""
        return self.ticket.take(self.layout, shared)


class _Lane(threading.local):
    """What the windows of one thread know of each other."""

    def __init__(self) -> None:
        #: The window that was made last.
        self.latest: weakref.ref[Window] | None = None
        #: By the address of the storage that was put away, and the part that was known unchanged.
        self.tickets: weakref.WeakValueDictionary[tuple[int, Part | None], Ticket] = (
            weakref.WeakValueDictionary()
        )


_lane = _Lane()


class Window:
    """The values of one run that are put away, in their order.

    Args:
        offload: where they go.
        in_flight: how many may be on their way: before the next one is put, the oldest of them is
            waited for and its memory let go of.
        ahead: how many are fetched before they are needed.
        last_first: whether the backward asks for them in the reverse order.
    """

    def __init__(
        self,
        offload: OffloadLike,
        in_flight: int = Offload.IN_FLIGHT,
        ahead: int = AHEAD,
        last_first: bool = False,
    ) -> None:
        self._offload = offload
        self._least = offload.min_bytes if isinstance(offload, Offload) else 0
        self._in_flight = in_flight
        self._ahead = ahead
        self._last_first = last_first
        self._on_the_way: deque[Ticket] = deque()
        #: In the order in which they were put.
        self._tickets: list[weakref.ref[Ticket]] = []
        self._fetched = 0
        self._before = _lane.latest
        _lane.latest = weakref.ref(self)

    def is_worth_moving(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor can be moved, and is large enough."""
        return is_movable(tensor) and tensor.untyped_storage().nbytes() >= max(self._least, 1)

    def put(self, tensor: torch.Tensor) -> Moved:
        """Begin to move a tensor; what shares its storage and was moved already is not moved again.

        Unless it has a version counter of its own: then nobody knows whether it has changed since.

        Raises:
            StoreFullError: it does not fit.
            StoreWriteError: one before it could not be written.
        """
        key = tensor.untyped_storage()._cdata, counted_part(tensor)
        ticket = _lane.tickets.get(key)
        if ticket is None or not ticket.is_of(tensor):
            while len(self._on_the_way) >= max(self._in_flight, 1):
                self._on_the_way.popleft().release()
            ticket = store_for(self._offload, tensor.device).put(tensor)
            _lane.tickets[key] = ticket
            self._on_the_way.append(ticket)
            if not self._in_flight:
                self.finish()
        self._tickets.append(weakref.ref(ticket))
        return Moved(ticket, Layout.of(tensor))

    def finish(self) -> None:
        """Let go of the memory of all that is on its way.

        Raises:
            StoreWriteError: a value could not be written.
        """
        while self._on_the_way:
            self._on_the_way.popleft().release()

    def forget(self) -> None:
        """Do not hold what is on its way; who has a ticket still has it."""
        self._on_the_way.clear()

    def fetch_from_the_first(self) -> None:
        """Begin to fetch the first values: they are asked for in the order of the forward."""
        self._fetched = 0
        self.fetch_next(self._ahead)

    def fetch_next(self, number: int = 1) -> None:
        """So many more of them, as some were taken."""
        while number and self._fetched < len(self._tickets):
            number -= self._fetch(self._fetched)
            self._fetched += 1

    def fetch_earlier(self, number: int) -> None:
        """Begin to fetch those before the ``number``-th, counted from 1, the latest first."""
        missing = self._ahead
        for index in range(number - 2, -1, -1):
            if not missing:
                return
            missing -= self._fetch(index)
        if missing:
            self.fetch_before()

    def fetch_before(self) -> None:
        """What the window before this one is asked for first: its turn is next in the backward."""
        window = self._before() if self._before is not None else None
        if window is None:
            return
        if window._last_first:
            window.fetch_earlier(window.count + 1)
        else:
            window.fetch_from_the_first()

    @property
    def count(self) -> int:
        """How many values were put."""
        return len(self._tickets)

    def _fetch(self, index: int) -> bool:
        """Begin to fetch one; whether there is one to be fetched."""
        ticket = self._tickets[index]()
        if ticket is None or ticket.was_taken or ticket.is_anothers:
            return False
        ticket.fetch()
        return True
