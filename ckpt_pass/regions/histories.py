"""Values with a history that runs of regions have found and later ones replaced: let it go.

What a run leaves on an attribute with its history holds the run's graph, that the run, and the run
what it found on the attribute when it began. Where no backward comes, each run would hold all those
before it. Of what it found a run needs the object and its values, for its recomputation, but no
history: what autograd saved is tied to the graph of the forward, never to the recomputation's. So
when nothing else refers to such a tensor, it is given the same memory without its history. Whether
anything else does is told as Python's garbage collector tells it: by the references that runs hold
themselves, counted, beside those that there are (``gc_refs`` in CPython's ``gcmodule.c``).
"""

from __future__ import annotations

import collections
import gc
import sys
import threading
import weakref
from collections.abc import Container, Iterable
from typing import Any

import torch

from ckpt_pass._torch import autograd
from ckpt_pass.regions.contents import Contents
from ckpt_pass.regions.holders import Holders
from ckpt_pass.regions.kinds import Kind, kind_of
from ckpt_pass.regions.noted import Searched
from ckpt_pass.regions.steps import Inner
from ckpt_pass.regions.tracks import OnTrack


class Histories:
    """The tensors with a history among what a run found when it began.

    Args:
        owner: what is to hold this, as ``histories``, and all that the run has found: what it
            refers to belongs to it.
        tensors: those.

    Attributes:
        tensors: as long as they have one.
        followed: whether a backward inside the run has gone through one of the histories, so that
            its recomputation needs them.
    """

    __slots__ = ("__weakref__", "_handles", "_versions", "followed", "tensors")

    def __init__(self, owner: Any, tensors: list[torch.Tensor]) -> None:
        _waiting.add(owner)
        self.followed = False
        self.tensors = tensors
        self._versions = [tensor._version for tensor in tensors]
        note = _Note(self)
        self._handles = [autograd.before_node_of(tensor, note) for tensor in tensors]

    def end(self) -> None:
        """The run's forward has ended: what backward goes through them now is not its own."""
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()

    def needed(self) -> list[torch.Tensor]:
        """Those whose history must stay."""
        if self.followed or self._handles:
            return self.tensors
        pairs = zip(self.tensors, self._versions, strict=True)
        return [tensor for tensor, version in pairs if tensor._version != version]

    def let_go(self, numbers: Container[int]) -> None:
        """Those of these ``id`` have no history any more."""
        pairs = zip(self.tensors, self._versions, strict=True)
        left = [pair for pair in pairs if id(pair[0]) not in numbers]
        self.tensors, self._versions = [t for t, _ in left], [version for _, version in left]


class _Note:
    """Notes a backward; a node of a graph must not hold what a run holds."""

    def __init__(self, histories: Histories) -> None:
        self._of = weakref.ref(histories)

    def __call__(self, grads: Any) -> None:
        found = self._of()
        if found is not None:
            found.followed = True


class _Waiting(threading.local):
    """The runs of a thread that have found histories, oldest first.

    They are looked at when there are twice as many as were left the last time: so a look costs each
    run the same, however many there are.
    """

    #: So many are let be.
    LEAST = 4

    def __init__(self) -> None:
        self._runs: list[weakref.ref[Any]] = []
        self._limit = self.LEAST

    def add(self, owner: Any) -> None:
        """Add what holds a run's, and let go what none needs."""
        if len(self._runs) >= self._limit:
            if not (autograd.transforms_active() or autograd.forward_derivatives_active()):
                self._let_go()
            owners = ((run, run()) for run in self._runs)
            self._runs = [run for run, one in owners if one is not None and one.histories.tensors]
            self._limit = max(self.LEAST, 2 * len(self._runs))
        self._runs.append(weakref.ref(owner))

    def _let_go(self) -> None:
        owners = [owner for run in self._runs if (owner := run()) is not None]
        every = [owner.histories for owner in owners]
        needed = {id(tensor) for one in every for tensor in one.needed()}
        free = {id(tensor) for one in every for tensor in one.tensors} - needed
        alone = {id(t): t for t in held_by_none_but([*owners, *every]) if id(t) in free}
        for tensor in alone.values():
            autograd.cut_history(tensor)
        for one in every:
            one.let_go(alone.keys())


_waiting = _Waiting()

#: Types of ours and of Python's that do nothing but hold: what they refer to is followed.
_HOLD = frozenset((Searched, OnTrack, Holders, Contents, Inner)) | frozenset(
    (list, dict, tuple, set, frozenset, collections.deque, collections.OrderedDict)
)


def held_by_none_but(owners: Iterable[Any]) -> list[torch.Tensor]:
    """The tensors with a history that only some objects refer to, and what these alone hold.

    Args:
        owners: those; what refers to them is not looked at.
    """
    found: dict[int, Any] = {}
    counts: collections.Counter[int] = collections.Counter()
    followed, going_on = set[int](), list(owners)
    while going_on:
        _count(going_on, found, counts)
        alone = {number for number in _all_counted(found, counts) if _holds(type(found[number]))}
        going_on = [found[number] for number in alone - followed]
        followed |= alone
    alone = _all_counted(found, counts)
    return [found[n] for n in found if n in alone and isinstance(found[n], torch.Tensor)]


def _count(holders: list[Any], found: dict[int, Any], counts: collections.Counter[int]) -> None:
    """Count what some objects refer to."""
    for holder in holders:
        for value in gc.get_referents(holder):
            if _holds(type(value)) or autograd.has_plain_history(value):
                found[id(value)] = value
                counts[id(value)] += 1


def _all_counted(found: dict[int, Any], counts: collections.Counter[int]) -> set[int]:
    """Those values that are referred to as often as was counted, besides by the table."""
    own = _references({0: object()})[0]
    return {n for n, there in _references(found).items() if there - own == counts[n]}


def _references(values: dict[int, Any]) -> dict[int, int]:
    return {number: sys.getrefcount(values[number]) for number in values}


def _holds(cls: type) -> bool:
    return cls in _HOLD or kind_of(cls) is Kind.OBJECT
