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
import itertools
import sys
import threading
import types
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ckpt_pass._torch import autograd
from ckpt_pass._torch.histories import Follower, cut_history, has_history, may_be_cut
from ckpt_pass.regions.kinds import ATOMS


class Histories:
    """The tensors with a history among what a run found when it began.

    Args:
        owner: the run's account, which is to hold this as ``histories``, and whose ``known`` says
            of which region it is; what its ``found`` holds is its own, and ``has`` tells which
            containers it puts contents back into.
        tensors: those; none where a run has changed what it found, and has ended.
    """

    __slots__ = ("__weakref__", "_busy", "_fixed", "_followed", "_handles", "_versions", "tensors")

    def __init__(self, owner: Any, tensors: Iterable[torch.Tensor]) -> None:
        self._followed = self._busy = False
        self.tensors: list[torch.Tensor] = []
        self._versions: list[int] = []
        self._fixed: list[bool] = []
        self._handles: list[Any] = []
        self.add(tensors)
        _waiting.add(owner)

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """The run, whose forward begins, has found more."""
        known = set(map(id, self.tensors))
        new = [tensor for tensor in tensors if id(tensor) not in known]
        self._busy |= bool(new)
        self.tensors += new
        self._versions += [tensor._version for tensor in new]
        fixed = [not may_be_cut(tensor) for tensor in new]
        self._fixed += fixed
        hook, pairs = Follower(self), zip(new, fixed, strict=True)
        watched = [tensor for tensor, stays in pairs if not stays]
        self._handles += [handle for tensor in watched for handle in hook.on(tensor)]

    @property
    def busy(self) -> bool:
        """Whether the run's forward goes on."""
        return self._busy

    def follow(self) -> None:
        """A backward inside the run goes through a history: its recomputation needs all."""
        self._followed = True

    def end(self) -> None:
        """The run's forward has ended: what backward goes through them now is not its own."""
        self._busy = False
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()

    def free(self) -> set[int]:
        """By ``id``, those whose history the run does not need."""
        if self._followed or self._busy:
            return set()
        each = zip(self.tensors, self._versions, self._fixed, strict=True)
        return {id(t) for t, version, fixed in each if not fixed and t._version == version}

    def let_go(self, numbers: set[int]) -> None:
        """Those of these ``id`` have no history any more, or must keep it."""
        self._fixed = [
            fixed or id(t) in numbers for t, fixed in zip(self.tensors, self._fixed, strict=True)
        ]


class _Runs:
    """The runs of one region that have found histories and may still be recomputed."""

    #: So many are let be; two are there while each run finds what the one before has left.
    LEAST = 3

    def __init__(self) -> None:
        self._runs: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._numbers = itertools.count()
        self._low, self._factor = 0, 2

    def add(self, owner: Any) -> bool:
        """Add one; return whether they have become so many that they are to be looked at.

        Twice as many as the fewest since the last look; more where that let nothing go: so a look
        costs each run the same, however many there are.
        """
        self._low = min(self._low, len(self._runs))
        self._runs[next(self._numbers)] = owner
        return len(self._runs) > max(self.LEAST, self._factor * self._low)

    def alive(self) -> list[Any]:
        """Those that are still there, oldest first."""
        return list(self._runs.values())

    def looked_at(self, any_let_go: bool) -> None:
        """Wait for more of them."""
        self._low, self._factor = len(self._runs), 2 if any_let_go else 4


class _Waiting:
    """The runs of all regions: a tensor may be what those of several have found."""

    def __init__(self) -> None:
        self._of: weakref.WeakKeyDictionary[Any, _Runs] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def add(self, owner: Any) -> None:
        """Add what holds a run's, and let go what none needs."""
        runs = self._of.get(owner.known)
        if runs is None:
            runs = self._of[owner.known] = _Runs()
        if not runs.add(owner) or autograd.transforms_active():
            return
        if autograd.forward_derivatives_active() or not self._lock.acquire(blocking=False):
            return
        try:
            every = list(self._of.values())
            any_let_go = again = self._let_go(every)
            while again:  # a view's base is free when the view is, and what was in a container
                again = self._let_go(every)
            for each in every:  # all were looked at
                each.looked_at(any_let_go)
        finally:
            self._lock.release()

    def _let_go(self, every: list[_Runs]) -> bool:
        """Let go histories and contents that none of the runs needs; return whether any went."""
        # A run that has begun just now has no histories yet, and holds nothing alone.
        found = [one for runs in every for one in runs.alive() if one.histories is not None]
        alone, containers, looked_at = held_by_none_but(found)
        numbers = set(map(id, alone))
        for owner in found:
            owner.histories.let_go(numbers)
        any_emptied = recomputations.empty(containers, looked_at)
        return any([any_emptied, *(cut_history(tensor) for tensor in alone)])


_waiting = _Waiting()

#: Types of values that hold nothing, or whose contents many refer to.
_PASSED_OVER = ATOMS | {torch.nn.Parameter, type, types.ModuleType, types.CodeType}


class _Found:
    """What some objects refer to, and how often they do.

    Args:
        tensors: by ``id``: of tensors, these are looked at.
    """

    def __init__(self, tensors: set[int]) -> None:
        self._tensors = tensors
        self.values: dict[int, Any] = {}
        self.counts: collections.Counter[int] = collections.Counter()

    def add(self, holder: Any) -> list[int]:
        """Count what one refers to; return it, by ``id``."""
        found = gc.get_referents(holder)
        if _PASSED_OVER.issuperset(map(type, found)):  # a long list of numbers, say
            return []
        looked_at = [value for value in found if self._is_looked_at(value)]
        for value in looked_at:
            self.values[id(value)] = value
        numbers = list(map(id, looked_at))
        self.counts.update(numbers)
        return numbers

    def known(self, holder: Any) -> list[int]:
        """What one that was added refers to, by ``id``."""
        return [number for number in map(id, gc.get_referents(holder)) if number in self.values]

    def _is_looked_at(self, value: Any) -> bool:
        if issubclass(type(value), torch.Tensor):  # a proxy would be asked for its class
            return id(value) in self._tensors
        return type(value) not in _PASSED_OVER and gc.is_tracked(value)

    def alone(self) -> set[int]:
        """Those that are referred to as often as was counted, besides by this."""
        own = _references({0: object()})[0]
        there = _references(self.values)
        return {number for number in there if there[number] - own == self.counts[number]}


def _references(values: dict[int, Any]) -> dict[int, int]:
    return {number: sys.getrefcount(values[number]) for number in values}


#: Containers that can be emptied, so can the attributes of plain objects. Sets cannot: filled
#: again, they go through their members in another order.
_EMPTIED = frozenset(
    {list, dict, collections.deque, collections.OrderedDict, collections.defaultdict}
)
#: Types of holders that do not notice that what they hold is emptied: neither iterators, which
#: know their place, nor generators, frames or functions.
_UNAWARE = _EMPTIED | {tuple, set, frozenset}
#: Types that Python code makes (``Py_TPFLAGS_HEAPTYPE``).
_OF_PYTHON = 1 << 9


def held_by_none_but(owners: Sequence[Any]) -> tuple[list[torch.Tensor], set[int], _Found]:
    """The tensors that only some runs refer to, and what these alone hold, and that none needs.

    Args:
        owners: the runs' accounts.

    Returns:
        These tensors; by ``id``, the containers of which the same is true, and that hold something;
        and what was looked at.
    """
    free = set[int]().union(*(owner.histories.free() for owner in owners))
    found, leads_to = _Found(free), dict[int, list[int]]()
    for owner in owners:
        leads_to[id(owner)] = [n for own in owner.found() for n in found.add(own)]
    going_on = found.alone()
    while going_on:
        for number in going_on:
            value = found.values[number]
            is_tensor = issubclass(type(value), torch.Tensor)
            leads_to[number] = [] if is_tensor else found.add(value)
        del value
        going_on = found.alone() - leads_to.keys()
    alone = found.alone()
    ending = [n for n in alone if _has_an_end(found.values[n])]
    aware = [n for n in alone if not _is_unaware(found.values[n])]
    tensors = (alone & free) - _reached(ending, leads_to)
    candidates = alone - _reached([*ending, *aware], leads_to)
    emptied = {n for n in candidates if _is_emptied(found.values[n])}
    for owner in owners:
        reached = _reached([id(owner)], leads_to)
        # What a run has found without a note of its history stays.
        tensors -= reached.intersection(tensors) - owner.histories.free()
        here = reached & emptied
        if here:  # its arguments it has as copies, which nothing is put into
            kept = _reached([n for own in owner.given() for n in found.known(own)], leads_to)
            may_be = here if not owner.histories.busy else set[int]()
            put_back = {n for n in may_be - kept if owner.has(found.values[n])}
            emptied -= here - put_back
    return [found.values[n] for n in found.values if n in tensors], emptied, found


def _is_emptied(value: Any) -> bool:
    """Whether it is a container that holds a tensor with a history, itself or in a tuple."""
    if type(value) not in _EMPTIED:
        return False
    held = gc.get_referents(value)
    inside = [one for part in held if type(part) is tuple for one in gc.get_referents(part)]
    return any(issubclass(type(one), torch.Tensor) and has_history(one) for one in held + inside)


def _has_an_end(value: Any) -> bool:
    """Whether code is run when a value goes, which may hand on what it has (a generator's, too)."""
    return hasattr(type(value), "__del__")


def _is_unaware(value: Any) -> bool:
    """Whether nobody notices when what a value leads to is emptied."""
    kind = type(value)
    if weakref.getweakrefcount(value) or issubclass(kind, torch.nn.Module):
        return False
    return kind in _UNAWARE or bool(kind.__flags__ & _OF_PYTHON)


def leads_to_history(values: Iterable[Any], depth: int = 3) -> bool:
    """Whether there is a tensor with a history among some values, or not far behind them."""
    for value in values:
        kind = type(value)
        if issubclass(kind, torch.Tensor):
            found = has_history(value)
        else:
            goes_on = depth and kind not in _PASSED_OVER and not issubclass(kind, torch.nn.Module)
            found = bool(goes_on) and leads_to_history(gc.get_referents(value), depth - 1)
        if found:
            return True
    return False


class Recomputations:
    """Those that go on now, of all threads: what they have put in is not emptied meanwhile."""

    def __init__(self) -> None:
        # Python's collector may run code of its user's, a backward even, at any time.
        self._lock = threading.RLock()
        self._count = 0

    def begin(self) -> None:
        """One begins to put in what its forward found."""
        with self._lock:
            self._count += 1

    def end(self) -> None:
        """It has put back what was there."""
        with self._lock:
            self._count -= 1

    def empty(self, containers: set[int], looked_at: _Found) -> bool:
        """Empty containers, unless there are any recomputations, or somebody has one by now.

        Returns:
            Whether any were.
        """
        dropped = []  # when the lock is free again: what goes may run code of its own
        with self._lock:
            still = looked_at.alone() & containers if containers else ()
            for number in () if self._count else still:
                container = looked_at.values[number]
                dropped.append(gc.get_referents(container))
                container.clear()
        return bool(dropped)


recomputations = Recomputations()


def _reached(starts: Iterable[int], leads_to: Mapping[int, list[int]]) -> set[int]:
    """The starts that are no owners, and all that they lead to."""
    todo = list(starts)
    reached = set(todo)
    while todo:
        new = set(leads_to.get(todo.pop(), ())) - reached
        reached |= new
        todo += new
    return reached
