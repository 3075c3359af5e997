"""The way to the holders of a module's state, kept from run to run where it is short.

To look for them costs as much as a region's small ops do. What was found is not kept, for it may
lead back to the module, which would then never be let go: the way to it is kept, by weak references
to modules, functions and classes. What is noted along the way is what tells that nothing has
changed, and what would be put back if it had: holders are made of it then, not before.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, chain, pairwise
from operator import attrgetter, itemgetter
from typing import Any, TypeVar

import torch
from torch import nn

from ckpt_pass._torch.dicts import marks_of
from ckpt_pass._torch.histories import has_history
from ckpt_pass.regions.classes import class_of
from ckpt_pass.regions.contents import Contents
from ckpt_pass.regions.holders import Holders
from ckpt_pass.regions.layouts import Layout
from ckpt_pass.regions.module_dicts import INTERNAL, read_by_runs
from ckpt_pass.regions.steps import Inner, inner_of, steps_from
from ckpt_pass.state.code_names import FUNCTION
from ckpt_pass.state.objects import Keeper
from ckpt_pass.state.spots import MISSING, Owner, space_of

Value = TypeVar("Value")
Space = Mapping[str, Any]
_NO_OBJECTS: list[tuple[Any, Keeper]] = []

_own = attrgetter("__dict__")
_globals_of = attrgetter("__globals__")
#: What is looked at of each module: what it is made of, and hooks, of which there are to be none.
_PARTS = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")
_parts = itemgetter(*_PARTS)
_EACH = len(_PARTS)
_PARAMETERS, _BUFFERS = 1, 2


class Track:
    """Where the state of a module is that has modules, tensors, and plain holders of numbers.

    Made of holders that were looked for; of use only where :meth:`leads_to` the same.

    Args:
        holders: what was found, without cells and objects, and with an owner for each spot.

    Attributes:
        marks: of the dicts along the way (:attr:`OnTrack.dicts`), when it was found.
        layout: of the same dicts: where the marks are the same, it is.
        modules: how many there are.
        own: how many modules and functions there are, that is dicts of their own.
        names: single names in namespaces, each with the number of its namespace.
        values: what these hold, by ``id``, for it may lead to the module.
        steps: from there to plain objects and containers.
        norms: as of the holders.
        all_move: whether all tensors may be given other memory and are seen to be.
        has_histories: whether ops have made any of them.
    """

    __slots__ = (
        "_closed",
        "_empty",
        "_held",
        "_read",
        "_references",
        "_types",
        "all_move",
        "has_histories",
        "layout",
        "marks",
        "modules",
        "names",
        "norms",
        "own",
        "steps",
        "values",
    )

    def __init__(self, holders: Holders) -> None:
        modules = holders.modules
        self._note_parts(modules)
        self.norms = holders.norms
        self.all_move = len(holders.movable()) == len(holders.tensors)
        self.has_histories = any(map(has_history, holders.tensors))
        names: dict[int, dict[str, Any]] = {}
        owners: dict[int, Owner] = {}
        for owner, (_, name, value) in zip(holders.owners, holders.spots, strict=True):
            assert owner is not None
            owners[id(owner)] = owner
            names.setdefault(id(owner), {})[name] = value
        # Functions, whose names are those of their files, come last.
        order = sorted(owners, key=lambda number: type(owners[number]) is FUNCTION)
        self._closed = sum(type(owner) is FUNCTION for owner in owners.values())
        self.names = [(n, name) for n, number in enumerate(order) for name in names[number]]
        spots = [value for number in order for value in names[number].values()]
        self.values = list(map(id, spots))
        known = {id(d) for m in modules for d in (m.__dict__, m.__dict__.get("_modules"))}
        known |= {id(tensor.__dict__) for tensor in holders.tensors}
        users = {f for m in modules for f in _functions_of(type(m)) if id(f.__dict__) not in known}
        self.modules, self.own = len(modules), len(modules) + len(users)
        led_by = [*modules, *users, *(owners[number] for number in order)]
        self._references = list(map(weakref.ref, led_by))
        self._types = list(map(id, map(type, led_by)))
        internal = {id(own[name]) for own in holders.hookless for name in INTERNAL if name in own}
        self.steps = steps_from([*holders.hookless, dict(enumerate(spots))], internal)
        self.marks: list[int] = []
        self.layout = Layout()

    def _note_parts(self, modules: list[nn.Module]) -> None:
        """Note where the parts of modules are, and which of them hold tensors."""
        parts = [module.__dict__[name] for module in modules for name in _PARTS]
        held = [[*range(k, len(parts), _EACH)] for k in range(_BUFFERS + 1)]
        order = list(chain.from_iterable(held))
        others = set(range(len(parts))).difference(order)
        self._held, self._empty = _picker(order), _picker(sorted(others))
        read = [n for n in held[_BUFFERS] if _reads_buffers(modules[n // _EACH])]
        self._read = _picker([n for n in held[_PARAMETERS] + read if parts[n]])

    def leads_to(self, holders: Holders) -> bool:
        """Whether all of the holders, and no others, are found again by it."""
        found = self._look()
        if found is None or not {dict}.issuperset(map(type, found.dicts)):
            return False
        if not {str}.issuperset(map(type, chain.from_iterable(found.dicts))):
            return False  # keys are kept, and any others may lead to the module
        own = map(read_by_runs, found.dicts[: self.modules])
        self.layout = Layout.of([*own, *found.dicts[self.modules :]], found.at_hand())
        self.marks = found.marks()
        again = found.holders
        return (
            _ids(again.hookless) == _ids(holders.hookless)
            and _ids(again.attributes) == _ids(holders.attributes)
            and _ids(again.parameters) == _ids(holders.parameters)
            and _ids(again.buffers) == _ids(holders.buffers)
            and _ids(again.tensors) == _ids(holders.tensors)
            and _ids(again.maps) == _ids(holders.maps)
            and _ids(again.lists) == _ids(holders.lists)
            and _ids(again.sets) == _ids(holders.sets)
        )

    def found(self) -> OnTrack | None:
        """The state as it is now; ``None`` where it is not certain that this is all of it."""
        found = self._look()
        if found is None or found.marks() != self.marks:
            return None
        if self.layout.taken or self.steps:
            found.hold()
        return found

    def _look(self) -> OnTrack | None:
        """The state, where modules, functions and names are those that were found.

        Few calls, most of them loops of C: this comes for every region that runs, and what runs
        between has put the code of each call out of the processor's caches.
        """
        things = [of() for of in self._references]
        try:
            dicts = list(map(_own, things))
            spaces = dicts[self.own :]
            if self._closed:
                spaces[-self._closed :] = map(_globals_of, things[-self._closed :])
        except AttributeError:  # what is gone is None, and has no such thing
            return None
        if list(map(id, map(type, things))) != self._types:
            return None
        parts = list(chain.from_iterable(map(_parts, dicts[: self.modules])))
        empty = self._empty(parts)
        if any(empty):
            return None
        values = [spaces[number].get(name, MISSING) for number, name in self.names]
        if list(map(id, values)) != self.values:
            self._forget_replaced(things, values)
            return None
        tensors = [t for held in self._read(parts) for t in held.values() if t is not None]
        dicts[self.own :] = self._held(parts)
        dicts += map(_own, tensors)
        found = OnTrack(self, things, dicts, empty, tensors, spaces, values)
        return found if not self.steps or found.goes_on() else None

    def _forget_replaced(self, things: list[Any], values: list[Any]) -> None:
        """Have looked anew for what is read by the methods of classes that have other ones now."""
        for value, number in zip(values, self.values, strict=True):
            if type(value) is FUNCTION and id(value) != number:
                for module in things[: self.modules]:
                    class_of.forget(type(module))


class OnTrack:
    """The state at the end of a track (:class:`ckpt_pass.regions.noted.Noted`).

    Args:
        track: the way.
        things: what it leads by: modules, functions, and what namespaces are found by.
        dicts: of modules and functions, of the modules' parts, of tensors; in the end of objects.
        empty: dicts of the modules' hooks, of which there are none.
        tensors: those that are held.
        spaces: namespaces.
        spots: what single names in them hold.
    """

    has_no_hooks = True
    _contents: Contents | None
    _held_inside: Inner | None
    _holders: Holders | None
    _inner: Inner | None
    _taken: Sequence[Any]

    __slots__ = (
        "_contents",
        "_empty",
        "_held_inside",
        "_holders",
        "_inner",
        "_spaces",
        "_spots",
        "_taken",
        "_things",
        "_track",
        "dicts",
        "norms",
        "objects",
        "tensors",
    )

    def __init__(
        self,
        track: Track,
        things: list[Any],
        dicts: list[dict[str, Any]],
        empty: Sequence[dict[Any, Any]],
        tensors: list[torch.Tensor],
        spaces: list[Space],
        spots: list[Any],
    ) -> None:
        self._track, self._things, self._empty = track, things, empty
        self._spaces, self._spots = spaces, spots
        self.dicts, self.tensors = dicts, tensors
        self.norms, self.objects = track.norms, _NO_OBJECTS
        self._holders = self._contents = self._inner = self._held_inside = None
        self._taken = ()

    def goes_on(self) -> bool:
        """Follow the track to plain objects and containers; whether it leads there."""
        begin: list[dict[Any, Any]] = [*self.dicts[: self._track.modules]]
        begin.append(dict(enumerate(self._spots)))
        inner = self._inner = inner_of(self._track.steps, begin)
        if inner is None:
            return False
        self.dicts += inner.fields
        return True

    def marks(self) -> list[int]:
        """What tells whether any of the dicts has been changed since, or along the track."""
        inner = self._inner
        return marks_of(self.dicts if inner is None else [*self.dicts, *inner.maps])

    def at_hand(self) -> list[Any]:
        """What is held anyway, of all that the dicts hold."""
        return [*self._things[: self._track.modules], *self.tensors, *self.dicts]

    def hold(self) -> None:
        """Hold the rest of it, and what containers hold."""
        dicts = self.dicts
        self._taken = [dicts[number][key] for number, key in self._track.layout.taken]
        if self._inner is not None:
            self._held_inside = self._inner.copied()

    @property
    def holders(self) -> Holders:
        """The holders; made when they are asked for."""
        if self._holders is None:
            track = self._track
            spaces = list(map(space_of, self._things[track.own :]))
            named = zip(track.names, self._spots, strict=True)
            spots = [(spaces[number], name, value) for (number, name), value in named]
            modules = self._things[: track.modules]
            self._holders = Holders.known(
                modules, self._sorted(self.dicts), self.tensors, spots, self.norms, self._inner
            )
            if track.all_move:
                self._holders.let_all_move()
        return self._holders

    @property
    def contents(self) -> Contents:
        """What they held; likewise."""
        if self._contents is None:
            copies = self._track.layout.copies([*self.at_hand(), *self._taken])
            flat = list(chain.from_iterable(self._sorted(copies)))
            self._contents = Contents.known(flat, self._spots, self._held_inside)
        return self._contents

    def _sorted(self, found: Sequence[Value]) -> tuple[list[Value], ...]:
        """What was found of each dict, in the order of the holders."""
        modules, own = self._track.modules, self._track.own
        # Children, parameters and buffers of all modules, in this order.
        ends = list(accumulate([modules] * (_BUFFERS + 1), initial=own))
        children, parameters, buffers = (list(found[a:b]) for a, b in pairwise(ends))
        others = [*found[ends[-1] :], *found[modules:own]]
        return list(found[:modules]), children + others, parameters, buffers

    def movable(self) -> list[torch.Tensor]:
        """The tensors that may be given other memory (``.data = ...``), and are seen to be."""
        return self.tensors if self._track.all_move else self.holders.movable()

    def histories(self) -> list[torch.Tensor]:
        """The tensors that ops have made."""
        found = self.tensors if self._track.has_histories else ()
        return list(filter(has_history, found))

    def is_still_held(self) -> bool:
        """Whether the holders hold the same now, object by object."""
        track, inner, held, spaces = self._track, self._inner, self._held_inside, self._spaces
        spots = [spaces[number].get(name, MISSING) for number, name in track.names]
        unchanged = (
            self.marks() == track.marks
            and not any(self._empty)
            and list(map(id, spots)) == track.values
            and (inner is None or held is None or inner.holds(held))
        )
        # Nearly always. What was changed and changed back is looked at value by value.
        return unchanged or self.contents.held_by(self.holders)


def _reads_buffers(module: nn.Module) -> bool:
    """Whether a module reads its buffers: running statistics are only written in training.

    Marks of dicts tell whether it is training still.
    """
    return not (class_of(type(module)).norm and module.__dict__["training"])


def _picker(numbers: list[int]) -> Callable[[Sequence[Value]], Sequence[Value]]:
    """What picks the values of these numbers."""
    if len(numbers) > 1:
        return itemgetter(*numbers)
    return lambda values: [values[number] for number in numbers]


def _functions_of(cls: type) -> Iterable[Any]:
    reads = class_of(cls).places.reads()
    return () if reads is None else reads.functions


def _ids(values: Iterable[Any]) -> set[int]:
    return set(map(id, values))


def track_of(holders: Holders) -> Track | None:
    """The way to a module's holders; ``None`` where it is too long to be worth keeping."""
    if not holders.lasting or holders.cells or holders.objects:
        return None
    if any(owner is None for owner in holders.owners):
        return None
    track = Track(holders)
    return track if track.leads_to(holders) else None
