"""The way to the holders of a module's state, kept from run to run where it is short.

To look for them costs as much as a region's small ops do. What was found is not kept, for it may
lead back to the module, which would then never be let go: the way to it is kept, by weak references
to modules, functions and classes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from operator import itemgetter
from typing import Any

import torch
from torch import nn

from ckpt_pass._torch.dicts import marks_of
from ckpt_pass.regions.classes import class_of
from ckpt_pass.regions.contents import Contents, Flat
from ckpt_pass.regions.holders import Holders
from ckpt_pass.regions.module_dicts import INTERNAL, read_by_runs
from ckpt_pass.regions.steps import inner_of, steps_from
from ckpt_pass.state.code_names import FUNCTION
from ckpt_pass.state.spots import Owner, read_spot, space_of


class Track:
    """Where the state of a module is that has modules, tensors, and plain holders of numbers.

    Made of holders that were looked for; of use only where :meth:`leads_to` the same.

    Args:
        holders: what was found.
    """

    __slots__ = (
        "_all_move",
        "_classes",
        "_functions",
        "_getters",
        "_inner_marks",
        "_marks",
        "_modules",
        "_names",
        "_norms",
        "_spots",
        "_steps",
        "_values",
    )

    def __init__(self, holders: Holders) -> None:
        modules = holders.modules
        self._modules = [(weakref.ref(m), class_of(type(m)).norm) for m in modules]
        self._classes = [id(type(module)) for module in modules]
        self._norms = holders.norms
        owned = zip(holders.owners, holders.spots, strict=True)
        self._spots: list[tuple[weakref.ref[Owner], str]] = [
            (weakref.ref(owner), name) for owner, (_, name, _) in owned if owner is not None
        ]
        #: By ``id``, for they may lead to the module.
        self._values = [id(value) for _, _, value in holders.spots]
        own = {id(d) for m in modules for d in (m.__dict__, m.__dict__.get("_modules"))}
        own |= {id(tensor.__dict__) for tensor in holders.tensors}
        users = {f for m in modules for f in _functions_of(type(m))}
        self._functions = [weakref.ref(f) for f in users if id(f.__dict__) not in own]
        begin: list[dict[Any, Any]] = [*holders.hookless]
        begin.append(_by_number(value for _, _, value in holders.spots))
        internal = {id(own[name]) for own in holders.hookless for name in INTERNAL if name in own}
        self._steps = steps_from(begin, internal)
        self._inner_marks: list[int] = []
        self._all_move = len(holders.movable()) == len(holders.tensors)
        self._marks: list[int] = []
        self._getters: list[itemgetter[Any]] = []
        self._names: list[tuple[str, ...]] = []

    def leads_to(self, holders: Holders) -> bool:
        """Whether all of the holders, and no others, are found again by it."""
        if not holders.lasting or holders.cells or holders.objects:
            return False
        if any(owner is None for owner in holders.owners):
            return False
        again = self._holders()
        if again is None or not {dict}.issuperset(map(type, again.dicts())):
            return False
        self._marks, self._inner_marks = again.marks(), marks_of(again.maps)
        read = [tuple(read_by_runs(own)) for own in again.hookless]
        self._getters = [itemgetter(*names) for names in read]
        self._names = read + [tuple(d) for d in again.dicts()[len(read) :]]
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

    def found(self) -> tuple[Holders, Contents] | None:
        """The holders, and what they hold; ``None`` where it is not certain that these are all."""
        holders = self._holders()
        if holders is None:
            return None
        if holders.marks() != self._marks or (
            holders.maps and marks_of(holders.maps) != self._inner_marks
        ):
            return None
        read = len(holders.hookless)
        values = [get(own) for get, own in zip(self._getters, holders.hookless, strict=True)]
        values += [tuple(d.values()) for d in holders.dicts()[read:]]
        contents = Contents(holders, Flat(self._names, values, self._marks))
        return holders, contents

    def _forget_replaced(self, modules: list[nn.Module], values: list[Any]) -> None:
        """Have looked anew for what is read by the methods of classes that have other ones now."""
        for value, number in zip(values, self._values, strict=True):
            if type(value) is FUNCTION and id(value) != number:
                for module in modules:
                    class_of.forget(type(module))

    def _holders(self) -> Holders | None:
        modules: list[nn.Module] = []
        hookless: list[dict[str, Any]] = []
        attributes: list[dict[str, Any]] = []
        parameters: list[dict[str, Any]] = []
        buffers: list[dict[str, Any]] = []
        tensors: list[torch.Tensor] = []
        for ref, norm in self._modules:
            module = ref()
            if module is None:
                return None
            own = module.__dict__
            if own["_forward_hooks"] or own["_forward_pre_hooks"]:
                return None
            modules.append(module)
            hookless.append(own)
            if children := own["_modules"]:
                attributes.append(children)
            if held := own["_parameters"]:
                parameters.append(held)
                tensors += [p for p in held.values() if p is not None]
            if held := own["_buffers"]:
                buffers.append(held)
                if not (norm and own["training"]):
                    tensors += [b for b in held.values() if b is not None]
        if list(map(id, map(type, modules))) != self._classes:
            return None
        attributes += [tensor.__dict__ for tensor in tensors]
        functions = [fn.__dict__ for of in self._functions if (fn := of()) is not None]
        owned = [(owner, n) for of, n in self._spots if (owner := of()) is not None]
        if len(functions) < len(self._functions) or len(owned) < len(self._spots):
            return None
        attributes += functions
        spaces = [(space_of(owner), name) for owner, name in owned]
        values = [read_spot(space, name) for space, name in spaces]
        if list(map(id, values)) != self._values:
            self._forget_replaced(modules, values)
            return None
        inner = None
        if self._steps:
            inner = inner_of(self._steps, [*hookless, _by_number(values)])
            if inner is None:
                return None
        spots = [(*place, value) for place, value in zip(spaces, values, strict=True)]
        dicts = (hookless, attributes, parameters, buffers)
        holders = Holders.known(modules, dicts, tensors, spots, self._norms, inner)
        if self._all_move:
            holders.let_all_move()
        return holders


def _by_number(values: Iterable[Any]) -> dict[int, Any]:
    return dict(enumerate(values))


def _functions_of(cls: type) -> Iterable[Any]:
    reads = class_of(cls).places.reads()
    return () if reads is None else reads.functions


def _ids(values: Iterable[Any]) -> set[int]:
    return set(map(id, values))


def track_of(holders: Holders) -> Track | None:
    """The way to a module's holders; ``None`` where it is too long to be worth keeping."""
    track = Track(holders)
    return track if track.leads_to(holders) else None
