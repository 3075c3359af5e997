"""The way to the holders of a module's state, kept from run to run where it is short.

To look for them costs as much as a region's small ops do. What was found is not kept, for it may
lead back to the module, which would then never be let go: the way to it is kept, by weak references
to modules, functions and classes. What is noted along the way is what tells that nothing has
changed, and what would be put back if it had: holders are made of it then, not before.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Iterable
from itertools import chain, compress, repeat
from operator import attrgetter, is_, itemgetter
from typing import Any, TypeVar, cast

import torch
from torch import nn

from ckpt_pass._torch.dicts import marks_of
from ckpt_pass.regions.classes import class_of
from ckpt_pass.regions.contents import Contents
from ckpt_pass.regions.holders import Holders
from ckpt_pass.regions.module_dicts import INTERNAL, read_by_runs
from ckpt_pass.regions.steps import Inner, inner_of, steps_from
from ckpt_pass.state.code_names import FUNCTION
from ckpt_pass.state.objects import Keeper
from ckpt_pass.state.spots import MISSING, Owner, mapping_of, space_of

Value = TypeVar("Value")
_NO_OBJECTS: list[tuple[Any, Keeper]] = []

_own = attrgetter("__dict__")
_values = dict.values
_parts = itemgetter("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")


class Track:
    """Where the state of a module is that has modules, tensors, and plain holders of numbers.

    Made of holders that were looked for; of use only where :meth:`leads_to` the same.

    Args:
        holders: what was found.

    Attributes:
        marks: of the dicts along the way (:attr:`OnTrack.dicts`), when it was found.
        keys: of the same dicts; equal marks are equal keys.
        filled: which modules have children, parameters and buffers.
        names: the single names in namespaces, by namespace.
        read_buffers: which modules read their buffers.
        steps: from there to plain objects and containers.
        norms: as of the holders.
        all_move: whether all tensors may be given other memory and are seen to be.
    """

    __slots__ = (
        "_classes",
        "_functions",
        "_modules",
        "_owners",
        "_values",
        "all_move",
        "filled",
        "keys",
        "marks",
        "names",
        "norms",
        "read_buffers",
        "steps",
    )

    def __init__(self, holders: Holders) -> None:
        modules = holders.modules
        self._modules = list(map(weakref.ref, modules))
        self._classes = _types_of(modules)
        self.read_buffers = list(map(_reads_buffers, modules))
        self.norms = holders.norms
        self.all_move = len(holders.movable()) == len(holders.tensors)
        names: dict[int, dict[str, Any]] = {}
        owners: dict[int, Owner] = {}
        for owner, (_, name, value) in zip(holders.owners, holders.spots, strict=True):
            if owner is not None:
                owners[id(owner)] = owner
                names.setdefault(id(owner), {})[name] = value
        self._owners: list[weakref.ref[Owner]] = list(map(weakref.ref, owners.values()))
        self.names = list(map(tuple, names.values()))
        spots = [value for found in names.values() for value in found.values()]
        #: By ``id``, for they may lead to the module.
        self._values = list(map(id, spots))
        known = {id(d) for m in modules for d in (m.__dict__, m.__dict__.get("_modules"))}
        known |= {id(tensor.__dict__) for tensor in holders.tensors}
        users = {f for m in modules for f in _functions_of(type(m))}
        self._functions = [weakref.ref(f) for f in users if id(f.__dict__) not in known]
        internal = {id(own[name]) for own in holders.hookless for name in INTERNAL if name in own}
        self.steps = steps_from([*holders.hookless, dict(enumerate(spots))], internal)
        self.marks: list[int] = []
        self.keys: list[tuple[str, ...]] = []
        self.filled: tuple[list[bool], ...] = ()

    def leads_to(self, holders: Holders) -> bool:
        """Whether all of the holders, and no others, are found again by it."""
        if not holders.lasting or holders.cells or holders.objects:
            return False
        if any(owner is None for owner in holders.owners):
            return False
        found = self._look()
        if found is None or not {dict}.issuperset(map(type, found.dicts)):
            return False
        self.marks, self.keys = found.marks(), list(map(tuple, found.dicts))
        self.filled = tuple(list(map(bool, part)) for part in found.parts)
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
        found.hold()
        return found

    def _look(self) -> OnTrack | None:
        """The state, where modules, functions and names are those that were found."""
        modules, owners = _there(self._modules), _there(self._owners)
        functions = _there(self._functions)
        if modules is None or owners is None or functions is None:
            return None
        if _types_of(modules) != self._classes:
            return None
        found = OnTrack(self, modules, owners, functions)
        if found.has_hooks():
            return None
        if list(map(id, found.spots)) != self._values:
            self._forget_replaced(modules, found.spots)
            return None
        return found if not self.steps or found.goes_on() else None

    def _forget_replaced(self, modules: list[nn.Module], values: list[Any]) -> None:
        """Have looked anew for what is read by the methods of classes that have other ones now."""
        for value, number in zip(values, self._values, strict=True):
            if type(value) is FUNCTION and id(value) != number:
                for module in modules:
                    class_of.forget(type(module))


class OnTrack:
    """The state at the end of a track (:class:`ckpt_pass.regions.noted.Noted`).

    Loops of C as far as possible: one is made for every region that runs.

    Args:
        track: the way.
        modules, owners, functions: what it leads by.

    Attributes:
        dicts: of modules, their parts, tensors, functions and objects.
        parts: those of children, of parameters and of buffers, one for each module.
        tensors: those that are held.
        spots: what single names in namespaces hold.
        norms, objects: as of the holders; there are no such objects along a track.
    """

    __slots__ = (
        "_contents",
        "_held_inside",
        "_holders",
        "_hooks",
        "_inner",
        "_modules",
        "_owners",
        "_spaces",
        "_track",
        "_values",
        "dicts",
        "norms",
        "objects",
        "parts",
        "spots",
        "tensors",
    )

    def __init__(
        self,
        track: Track,
        modules: list[nn.Module],
        owners: list[Owner],
        functions: list[types.FunctionType],
    ) -> None:
        self._track, self._modules, self._owners = track, modules, owners
        self._holders: Holders | None = None
        self._contents: Contents | None = None
        self._inner: Inner | None = None
        self._held_inside: Inner | None = None
        self.norms = track.norms
        self.objects = _NO_OBJECTS
        owns = list(map(_own, modules))
        *self.parts, hooks, hooks_before = zip(*map(_parts, owns), strict=True)
        self._hooks = hooks + hooks_before
        children, parameters, buffers = self.parts
        read = chain(parameters, compress(buffers, track.read_buffers))
        self.tensors = tensors = [t for held in read for t in held.values() if t is not None]
        others = chain(map(_own, tensors), map(_own, functions))
        self.dicts = [*owns, *children, *parameters, *buffers, *others]
        self._spaces = list(map(mapping_of, owners))
        self.spots = self._read_spots()

    def _read_spots(self) -> list[Any]:
        names = zip(self._spaces, self._track.names, strict=True)
        return [space.get(name, MISSING) for space, found in names for name in found]

    def has_hooks(self) -> bool:
        """Whether any of the modules has a hook around its forward."""
        return any(self._hooks)

    def goes_on(self) -> bool:
        """Follow the track to plain objects and containers; whether it leads there."""
        begin = [*self.dicts[: len(self._modules)], dict(enumerate(self.spots))]
        inner = self._inner = inner_of(self._track.steps, begin)
        if inner is None:
            return False
        self.dicts += inner.fields
        return True

    def marks(self) -> list[int]:
        """What tells whether any of the dicts has been changed since, or along the track."""
        inner = self._inner
        return marks_of(self.dicts if inner is None else [*self.dicts, *inner.maps])

    def hold(self) -> None:
        """Hold what the holders hold now: the track's marks, which are theirs, say by what keys."""
        self._values = list(chain.from_iterable(map(_values, self.dicts)))
        if self._inner is not None:
            self._held_inside = self._inner.copied()

    @property
    def holders(self) -> Holders:
        """The holders; made when they are asked for."""
        if self._holders is None:
            spaces = map(space_of, self._owners)
            names = zip(spaces, self._track.names, strict=True)
            places = [(space, name) for space, found in names for name in found]
            spots = [(*place, value) for place, value in zip(places, self.spots, strict=True)]
            self._holders = Holders.known(
                self._modules,
                self._sorted(self.dicts),
                self.tensors,
                spots,
                self.norms,
                self._inner,
            )
            if self._track.all_move:
                self._holders.let_all_move()
        return self._holders

    @property
    def contents(self) -> Contents:
        """What they held; likewise."""
        if self._contents is None:
            values = iter(self._values)
            # `values` goes on where the keys of a dict end, which are asked for first.
            held = [dict(zip(keys, values, strict=False)) for keys in self._track.keys]
            hookless, *others = self._sorted(held)
            copies = [*map(read_by_runs, hookless), *chain.from_iterable(others)]
            self._contents = Contents.known(copies, self.spots, self._held_inside)
        return self._contents

    def _sorted(self, found: list[Value]) -> tuple[list[Value], ...]:
        """What was found of each dict, in the order of the holders; empty parts are none."""
        count = len(self._modules)
        rows = [found[n * count : (n + 1) * count] for n in range(4)]
        children, parameters, buffers = map(list, map(compress, rows[1:], self._track.filled))
        return rows[0], children + found[4 * count :], parameters, buffers

    def movable(self) -> list[torch.Tensor]:
        """The tensors that may be given other memory (``.data = ...``), and are seen to be."""
        return self.tensors if self._track.all_move else self.holders.movable()

    def is_still_held(self) -> bool:
        """Whether the holders hold the same now, object by object."""
        inner, held = self._inner, self._held_inside
        unchanged = (
            self.marks() == self._track.marks
            and not any(self._hooks)
            and all(map(is_, self._read_spots(), self.spots))
            and (inner is None or held is None or inner.holds(held))
        )
        # Nearly always. What was changed and changed back is looked at value by value.
        return unchanged or self.contents.held_by(self.holders)


def _there(references: Iterable[weakref.ref[Value]]) -> list[Value] | None:
    """What weak references lead to; ``None`` where any of it is gone."""
    found = [of() for of in references]
    if any(map(is_, found, repeat(None))):
        return None
    return cast(list[Value], found)


def _types_of(values: Iterable[Any]) -> list[int]:
    return list(map(id, map(type, values)))


def _reads_buffers(module: nn.Module) -> bool:
    """Whether a module reads its buffers: running statistics are only written in training.

    Whether it is training is among what marks tell.
    """
    return not (class_of(type(module)).norm and module.__dict__.get("training"))


def _functions_of(cls: type) -> Iterable[Any]:
    reads = class_of(cls).places.reads()
    return () if reads is None else reads.functions


def _ids(values: Iterable[Any]) -> set[int]:
    return set(map(id, values))


def track_of(holders: Holders) -> Track | None:
    """The way to a module's holders; ``None`` where it is too long to be worth keeping."""
    track = Track(holders)
    return track if track.leads_to(holders) else None
