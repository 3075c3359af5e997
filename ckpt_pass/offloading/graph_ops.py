"""Moves as ops of a graph: a value is put away, let go of, asked for, and taken again.

What stands for the value between its halves is a *ticket*: a tensor of one number on the host. Its
place in the store is taken as long as that tensor's memory lives, so that autograd, which keeps the
tensor, keeps the place, and lets go of both together.
"""

from __future__ import annotations

import functools
import itertools
import json
import struct
import weakref
from dataclasses import asdict
from typing import Any, TypeAlias

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ckpt_pass._errors import CkptPassError
from ckpt_pass.offloading.options import Offload
from ckpt_pass.offloading.store import Store, Ticket
from ckpt_pass.offloading.stores import OffloadLike, store_for


class LostTicketError(CkptPassError, RuntimeError):
    """A graph asks for a value with a tensor that is no ticket of this process."""


class LostStoreError(CkptPassError, RuntimeError):
    """A graph puts values into a store of the user's that is gone."""


#: How the words for a store of the user's begin; those for options are JSON.
_OWN = "a store of the user's, "


class _Number(bytearray):
    """The memory of a ticket; unlike a plain ``bytearray`` it can be watched."""

    __slots__ = ("__weakref__",)


class _Desk:
    """Finds the ticket behind a number, as long as the tensor that has it lives."""

    def __init__(self) -> None:
        self._tickets: dict[int, Ticket] = {}
        self._numbers = itertools.count(1)
        self._stores: weakref.WeakValueDictionary[str, Store] = weakref.WeakValueDictionary()

    def check_in(self, ticket: Ticket) -> torch.Tensor:
        number = next(self._numbers)
        memory = _Number(struct.pack("=q", number))
        self._tickets[number] = ticket
        weakref.finalize(memory, self._tickets.pop, number).atexit = False
        return torch.frombuffer(memory, dtype=torch.int64)

    def ticket(self, tensor: torch.Tensor) -> Ticket:
        number = int(tensor)
        if number not in self._tickets:
            raise LostTicketError(
                f"Ticket {number} is not known in this process, expected one of a forward that ran "
                "here and whose graph is still alive. Run the backward in the process of its "
                "forward, and offload nothing in a graph whose saved tensors are copied by hooks."
            )
        return self._tickets[number]

    def words_of(self, offload: OffloadLike) -> str:
        if isinstance(offload, Offload):
            fields = {name: value for name, value in asdict(offload).items() if value is not None}
            return json.dumps(fields, default=str)  # a folder may be a path
        words = f"{_OWN}{id(offload)}"
        self._stores[words] = offload
        return words

    def store(self, words: str, device: torch.device) -> Store:
        if not words.startswith(_OWN):
            return store_for(_parsed(words), device)
        own = self._stores.get(words)
        if own is None:
            raise LostStoreError(
                f"The graph moves values to {words}, which is gone. Expected it to live as long as "
                "the compiled model. Keep the store, or give Offload(...) instead of one."
            )
        return own


#: One for the process, as the values in autograd's graphs are.
_DESK = _Desk()
#: The store that a graph names, in words for :data:`PUT`.
words_of = _DESK.words_of


@functools.lru_cache(maxsize=16)
def _parsed(words: str) -> Offload:
    return Offload(**json.loads(words))


#: Size, stride, dtype, device.
Look: TypeAlias = tuple[list[int], list[int], torch.dtype, torch.device]


def look_of(value: torch.Tensor) -> Look:
    """How :data:`TAKE` is told what it returns: size, stride, dtype, device."""
    return list(value.size()), list(value.stride()), value.dtype, value.device


def fake_ticket() -> torch.Tensor:
    """What a ticket looks like."""
    return torch.empty(1, dtype=torch.int64, device="cpu")


_LIBRARY = torch.library.Library("ckpt_pass", "FRAGMENT")
#: What is put away lies in memory as its taker expects it, whatever a compiler would prefer.
_EXACT = (torch.Tag.needs_exact_strides,)
# Tickets are said to be written to: compilers neither drop such ops nor change their order.
_LIBRARY.define("hold(Tensor(a) value) -> Tensor(a)", tags=_EXACT)
_LIBRARY.define("put(Tensor value, str where) -> Tensor", tags=_EXACT)
_LIBRARY.define("release(Tensor(a!) ticket, Tensor value) -> ()", tags=_EXACT)
_LIBRARY.define("fetch(Tensor(a!) ticket) -> ()")
_LIBRARY.define(
    "take(Tensor ticket, SymInt[] size, SymInt[] stride, ScalarType dtype, Device device) -> Tensor"
)


def _hold(value: torch.Tensor) -> torch.Tensor:
    return value.detach()


def _put(value: torch.Tensor, where: str) -> torch.Tensor:
    return _DESK.check_in(_DESK.store(where, value.device).put(value))


def _release(ticket: torch.Tensor, value: torch.Tensor) -> None:
    _DESK.ticket(ticket).release()


def _fetch(ticket: torch.Tensor) -> None:
    _DESK.ticket(ticket).fetch()


def _take(ticket: torch.Tensor, *look: Any) -> torch.Tensor:
    return _DESK.ticket(ticket).take()


class _FakeDesk:
    """Holds what stands for memory in a step on fake tensors, as long as the real step has it."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[StorageWeakRef, torch.Tensor | None, Look | None]] = {}

    def put(self, value: torch.Tensor, where: str) -> torch.Tensor:
        gone = [key for key, (ticket, _, _) in self._held.items() if ticket.expired()]
        for key in gone:
            del self._held[key]
        ticket = fake_ticket()
        self._set(ticket, value, look_of(value))
        return ticket

    def release(self, ticket: torch.Tensor, value: torch.Tensor) -> None:
        _, _, look = self._get(ticket)
        self._set(ticket, None, look)

    def fetch(self, ticket: torch.Tensor) -> None:
        _, value, look = self._get(ticket)
        if value is None and look is not None:
            self._set(ticket, _made(*look), look)

    def memory(self, ticket: torch.Tensor) -> torch.Tensor | None:
        """What stands for the memory that a fake ticket holds on the device."""
        return self._get(ticket)[1]

    def take(self, ticket: torch.Tensor, *look: Any) -> torch.Tensor:
        _, value, known = self._get(ticket)
        self._set(ticket, None, known)
        return _made(*look) if value is None else value.detach()

    def _get(
        self, ticket: torch.Tensor
    ) -> tuple[StorageWeakRef | None, torch.Tensor | None, Look | None]:
        return self._held.get(ticket.untyped_storage()._cdata, (None, None, None))

    def _set(self, ticket: torch.Tensor, value: torch.Tensor | None, look: Look | None) -> None:
        storage = ticket.untyped_storage()
        self._held[storage._cdata] = (StorageWeakRef(storage), value, look)


def _made(size: Any, stride: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=device)


_FAKE_DESK = _FakeDesk()
#: What stands for the memory that :data:`FETCH` has taken for a fake ticket; no op returns it.
fetched_memory = _FAKE_DESK.memory


for _name, _real, _fake in (
    ("hold", _hold, _hold),
    ("put", _put, _FAKE_DESK.put),
    ("release", _release, _FAKE_DESK.release),
    ("fetch", _fetch, _FAKE_DESK.fetch),
    ("take", _take, _FAKE_DESK.take),
):
    _LIBRARY.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ckpt_pass::{_name}", _fake, lib=_LIBRARY)

#: value -> value: the same memory, which a compiler gives to nothing else while this one is used.
HOLD = torch.ops.ckpt_pass.hold.default
#: (value, where) -> ticket: begin to copy a value into a store.
PUT = torch.ops.ckpt_pass.put.default
#: (ticket, value): wait for that copy; the value's memory is free once nothing else reads it.
RELEASE = torch.fx.node.has_side_effect(torch.ops.ckpt_pass.release.default)
#: (ticket): take memory on the device, and begin to copy the value back.
FETCH = torch.fx.node.has_side_effect(torch.ops.ckpt_pass.fetch.default)
#: (ticket, size, stride, dtype, device) -> value: wait for that copy.
TAKE = torch.ops.ckpt_pass.take.default
