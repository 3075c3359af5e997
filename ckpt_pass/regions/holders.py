"""Find what holds the state that a region reads besides its arguments.

That is whatever its function leads to: the attributes, parameters, buffers and hooks of modules,
closures, the globals that its own code names, class attributes, and the containers and plain
objects among them. To look for them takes some ten microseconds a module; where the way to them is
short, it is kept from run to run (:mod:`ckpt_pass.regions.tracks`).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import types
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn

from ckpt_pass._torch import autograd, modules
from ckpt_pass._torch.dicts import marks_of
from ckpt_pass.regions.classes import class_of, reads_of_class
from ckpt_pass.regions.kinds import ATOMS, VALUES, Kind, is_users, kind_of
from ckpt_pass.regions.module_dicts import FIRST, FORWARD_HOOKS, INTERNAL, NAMES
from ckpt_pass.regions.steps import Inner
from ckpt_pass.state.code_names import FUNCTION, Reads, contents_of, reads_of
from ckpt_pass.state.objects import Keeper, held_inside, keeper_for
from ckpt_pass.state.raw import items_of
from ckpt_pass.state.remembered import Remembered
from ckpt_pass.state.shown import owner_of, shown_by
from ckpt_pass.state.spots import MISSING, Owner, read_spot, slots_of

#: Objects found in objects are followed so far: deeper lies what a region does not work on.
_OBJECT_DEPTH = 3
_slots: Callable[[Any], tuple[str, ...]] = Remembered(slots_of)
_NOTHING: list[Any] = []
#: A name in a namespace (a dict of globals, a class, an object with slots) that holds a value.
Spot = tuple[Any, str, Any]


class Holders:
    """The holders that some values lead to, each once.

    Attributes:
        hookless: dicts of attributes of modules that have no hooks around their forward.
        attributes: those of other modules and objects, and dicts of submodules.
        parameters, buffers: the modules' dicts of them.
        maps, lists, sets: containers.
        cells: variables of closures.
        spots: single names in namespaces that belong to others too, and what they hold.
        owners: what the namespaces of these are found by; ``None`` for an object's own fields.
        modules: those that were met.
        objects: those with a state of their own, and how it is kept.
        tensors: the tensors that are held; some more than once.
        lasting: whether the only tensors are modules' parameters and buffers, which stay.
        simple: whether there is nothing else besides numbers and code, either.
        norms: whether a normalisation that may have running statistics is among the modules.
        seeds: whether code of theirs may set a random state.
    """

    __slots__ = (
        "_movable",
        "_seen",
        "_todo",
        "attributes",
        "buffers",
        "cells",
        "hookless",
        "lasting",
        "lists",
        "maps",
        "modules",
        "norms",
        "objects",
        "owners",
        "parameters",
        "seeds",
        "sets",
        "simple",
        "spots",
        "tensors",
    )

    def __init__(self, *roots: Any) -> None:
        self.attributes: list[dict[str, Any]] = []
        self.parameters: list[dict[str, Any]] = []
        self.buffers: list[dict[str, Any]] = []
        self.maps: list[dict[Any, Any]] = []
        self.lists: list[Any] = []
        self.sets: list[set[Any]] = []
        self.cells: list[types.CellType] = []
        self.spots: list[Spot] = []
        self.owners: list[Owner | None] = []
        self.modules: list[nn.Module] = []
        self.hookless: list[dict[str, Any]] = []
        self.objects: list[tuple[Any, Keeper]] = []
        self.tensors: list[torch.Tensor] = []
        self.lasting = self.simple = True
        self.norms = self.seeds = False
        self._movable: list[torch.Tensor] | None = None
        self._seen: set[Any] = set()
        self._todo: list[tuple[Any, int]] = []
        self.add(*roots)

    @classmethod
    def known(
        cls,
        modules: list[nn.Module],
        dicts: tuple[list[dict[str, Any]], ...],
        tensors: list[torch.Tensor],
        spots: list[Spot],
        norms: bool,
        inner: Inner | None = None,
    ) -> Holders:
        """Holders that need not be looked for; nothing is added to them.

        Args:
            modules, tensors, spots, norms: as the attributes of these names.
            dicts: ``hookless``, ``attributes``, ``parameters`` and ``buffers``.
            inner: the containers that these lead to.
        """
        made = cls.__new__(cls)
        made.modules, made.tensors, made.spots, made.norms = modules, tensors, spots, norms
        made.hookless, made.attributes, made.parameters, made.buffers = dicts
        made.maps = made.lists = made.sets = made.cells = made.objects = _NOTHING
        if inner is not None:
            made.maps, made.lists, made.sets = inner.maps, list(inner.lists), inner.sets
        made.lasting, made.simple, made.seeds = True, True, False
        made._movable = None
        made._seen = set()
        return made

    def add(self, *roots: Any) -> None:
        """Follow more values."""
        for root in roots:
            if isinstance(root, nn.Module):
                self._module(root)
            elif isinstance(root, FUNCTION):
                self._read(reads_of([root]))
                self._todo.append((root, 0))
            elif isinstance(root, types.MethodType):
                self.add(root.__func__, root.__self__)
            elif isinstance(root, functools.partial):
                self.add(root.func)
                self._todo.append((root, 0))
            else:
                if kind_of(type(root)) is Kind.OBJECT:
                    self._class(type(root))
                self._todo.append((root, 0))
        looked_at = 0
        while self._todo or looked_at < len(self.tensors):
            while self._todo:
                self._follow(*self._todo.pop())
            for tensor in self.tensors[looked_at:]:
                if not autograd.is_gathered(tensor):  # FSDP1 keeps its account on its parameters
                    self._fields(tensor.__dict__, 0)
                looked_at += 1

    def has(self, container: Any) -> bool:
        """Whether a container is among the holders."""
        if not self._seen:  # nothing was looked for: what is here was known
            self._seen.update(map(id, (*self.mappings(), *self.modules)))
        return id(container) in self._seen

    def containers(self) -> Iterator[Any]:
        """Lists, dicts and sets, and the attributes of what is no module."""
        modules = {id(module.__dict__) for module in self.modules}
        attributes = (own for own in self.attributes if id(own) not in modules)
        return chain(self.maps, self.lists, self.sets, attributes)

    def movable(self) -> list[torch.Tensor]:
        """The tensors that may be given other memory (``.data = ...``), and are seen to be."""
        if self._movable is None:
            self._movable = [
                t for t in self.tensors if has_memory(t) and not autograd.is_gathered(t)
            ]
        return self._movable

    def let_all_move(self) -> None:
        """Take it as known that all tensors are of these."""
        self._movable = self.tensors

    def dicts(self) -> list[dict[str, Any]]:
        """Those of modules, of functions and of objects: all but the containers."""
        return [*self.hookless, *self.attributes, *self.parameters, *self.buffers]

    def marks(self) -> list[int]:
        """What tells whether those dicts have been changed since."""
        return marks_of(self.dicts())

    def mappings(self) -> Iterator[dict[Any, Any]]:
        """All dicts among the holders."""
        yield from self.hookless
        yield from self.attributes
        yield from self.parameters
        yield from self.buffers
        yield from self.maps

    def _is_new(self, holder: Any) -> bool:
        new = id(holder) not in self._seen
        self._seen.add(id(holder))
        return new

    def _module(self, root: nn.Module) -> None:
        seen, attributes = self._seen, self.attributes
        todo: list[nn.Module | None] = [root]
        while todo:
            module = todo.pop()
            if module is None or id(module) in seen:
                continue
            seen.add(id(module))
            own = module.__dict__
            known = class_of(type(module))
            children = own.get("_modules")
            if children:
                todo += children.values()
            if known.norm:
                self.norms = True
            self.modules.append(module)
            if known.scripted:
                self._scripted(module)
            if known.managed:
                continue
            # Those that hold nothing, too: something may be put there before the backward.
            if children or type(children) is dict:
                attributes.append(children)
            parameters = own["_parameters"]
            if parameters or type(parameters) is dict:
                self.parameters.append(parameters)
                self.tensors += [p for p in parameters.values() if p is not None]
            buffers = own["_buffers"]
            if buffers or type(buffers) is dict:
                self.buffers.append(buffers)
                # Running statistics are written in training, and not read: each run moves them on.
                if not (known.norm and own["training"]):
                    self.tensors += [b for b in buffers.values() if b is not None]
            if own["_forward_hooks"] or own["_forward_pre_hooks"]:
                # Which hooks there are is put back, and what they note for their user stays.
                attributes.append(own)
                self.maps += [own[name] for name in FORWARD_HOOKS if self._is_new(own[name])]
            else:
                self.hookless.append(own)
            names = list(own)
            if names[:FIRST] == NAMES:  # nearly always
                names = names[FIRST:]
            for name in names:
                if type(own[name]) not in ATOMS and name not in INTERNAL:
                    self._todo.append((own[name], 0))
            if known.bases and id(known) not in seen:
                seen.add(id(known))
                self._class(type(module))

    def _scripted(self, module: nn.Module) -> None:
        """Note the attributes of one of TorchScript's modules; lists come as copies of them."""
        self.lasting = self.simple = False
        for name in modules.script_attributes(module):
            value = getattr(module, name)
            self._note(None, module, name, value)
            if isinstance(value, torch.Tensor):
                self.tensors.append(value)

    def _class(self, cls: type) -> None:
        known = class_of(cls)
        bases = [base for ref in known.bases if (base := ref()) is not None]
        for base in bases:
            if base in self._seen:
                continue
            self._seen.add(base)
            for name, value in vars(base).items():
                if name.startswith("__"):
                    continue
                if type(value) is FUNCTION:  # another may be there for the forward only
                    self._note(base, base, name, value)
                else:
                    self._spot(base, name, value)
        for name in known.stored if bases else ():
            if not hasattr(bases[0], name):
                self._note(bases[0], bases[0], name, MISSING)
        self._read(reads_of_class(cls))

    def _note(self, owner: Owner | None, space: Any, name: str, value: Any) -> None:
        self.spots.append((space, name, value))
        self.owners.append(owner)

    def _read(self, reads: Reads) -> None:
        self.seeds |= reads.seeds
        for owner, (space, name) in zip(reads.owners, reads.names, strict=True):
            value = read_spot(space, name)
            self._note(owner, space, name, value)
            if type(value) not in ATOMS and value is not MISSING:
                self._todo.append((value, 0))
        for fn in reads.functions:
            self._fields(fn.__dict__, 0)
        self._todo += [(value, 0) for value in (*reads.generators, *reads.defaults)]
        for cell in reads.cells:
            self._cell(cell, 0)

    def _cell(self, cell: types.CellType, depth: int) -> None:
        if self._is_new(cell):
            self.cells.append(cell)
            self._contents(tuple(contents_of(cell)), depth)

    def _spot(self, base: type, name: str, value: Any) -> None:
        kind = kind_of(type(value))
        if kind is Kind.IGNORED and type(value) not in VALUES:
            return
        self._note(base, base, name, value)
        if kind is not Kind.IGNORED:
            self._todo.append((value, 0))

    def _follow(self, value: Any, depth: int) -> None:
        kind = kind_of(type(value))
        if kind is Kind.IGNORED:
            return
        if kind is Kind.TUPLE and ATOMS.issuperset(map(type, value)):
            return
        if type(value) is types.BuiltinFunctionType and owner_of(value) is None:
            return  # `self.act = torch.tanh`
        self.simple = False
        if kind is Kind.TENSOR:
            self.tensors.append(value)
            self.lasting = False
            return
        if kind is Kind.MODULE:
            if depth < _OBJECT_DEPTH:
                self._module(value)
            return
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        self._into(kind, value, depth)

    def _into(self, kind: Kind, value: Any, depth: int) -> None:
        """Note a holder and follow what it holds."""
        if kind is Kind.DICT:
            self.maps.append(value)
            self._contents(dict.values(value), depth)
        elif kind is Kind.LIST:
            self.lists.append(value)
            self._contents(items_of(value), depth)
        elif kind is Kind.TUPLE:
            self._contents(value, depth)
        elif kind is Kind.SET:
            self.sets.append(value)
            self._contents(items_of(value), depth)
        elif kind is Kind.FUNCTION:
            self._closure(value, depth)
        elif kind is Kind.METHOD:
            self._contents((value.__func__, value.__self__), depth)
        elif kind is Kind.PARTIAL:
            self._contents((value.func, value.args, value.keywords), depth)
            self._fields(value.__dict__, depth)
        elif kind is Kind.REFERENCE:
            self._contents((value(),), depth)
        elif kind is Kind.SHOWING:
            self._shown(value, depth)
        elif (keeper := keeper_for(type(value))) is not None:
            self.objects.append((value, keeper))
            self._contents(held_inside(value), depth)
        if kind is Kind.OBJECT or (kind in (Kind.DICT, Kind.LIST) and _has_fields(value)):
            self._object(value, depth)

    def _shown(self, value: Any, depth: int) -> None:
        for thing in shown_by(value):
            keeper = keeper_for(type(thing))
            if keeper is not None and keeper.copy is not None and self._is_new(thing):
                # `count().__next__`: no copy of it can take its place here.
                self.objects.append((thing, dataclasses.replace(keeper, copy=None)))
                self._contents(held_inside(thing), depth)
            else:
                self._contents((thing,), depth)

    def _closure(self, fn: types.FunctionType, depth: int) -> None:
        if fn.__code__ not in self._seen and is_users(fn):
            self._seen.add(fn.__code__)
            self._read(reads_of([fn]))
        for cell in fn.__closure__ or ():
            self._cell(cell, depth)

    def _object(self, value: Any, depth: int) -> None:
        if depth >= _OBJECT_DEPTH:
            return
        own = getattr(value, "__dict__", None)
        if type(own) is dict:
            self._fields(own, depth + 1)
        for name in _slots(type(value)):
            held = getattr(value, name, None)
            self._note(None, value, name, held)
            self._contents((held,), depth + 1)

    def _fields(self, own: dict[str, Any], depth: int) -> None:
        if self._is_new(own):
            self.attributes.append(own)
            self._contents(own.values(), depth)

    def _contents(self, values: Any, depth: int) -> None:
        if set(map(type, values)) - ATOMS:  # large tables of numbers are left at once
            self._todo += [(value, depth) for value in values if type(value) not in ATOMS]


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a plain one with elements in a row of memory."""
    plain = type(tensor) is torch.Tensor or type(tensor) is nn.Parameter
    return plain and tensor.layout is torch.strided and not tensor.is_nested


def _has_fields(value: Any) -> bool:
    return type(value) not in (dict, list, collections.deque) and hasattr(value, "__dict__")
