"""What the holders of a region's state hold at a moment: noted, compared, put back."""

from __future__ import annotations

import collections
import types
from collections.abc import Iterable, Iterator
from itertools import chain
from operator import is_
from typing import Any

from ckpt_pass._torch import autograd
from ckpt_pass.regions.holders import Holders, Spot
from ckpt_pass.regions.module_dicts import FORWARD_HOOKS, read_by_runs
from ckpt_pass.regions.steps import Inner
from ckpt_pass.state.code_names import contents_of
from ckpt_pass.state.objects import Keeper
from ckpt_pass.state.raw import entries_of, items_of, mapping_class
from ckpt_pass.state.spots import read_spot, write_spot


class Contents:
    """What a number of holders hold at a moment, by reference.

    Args:
        holders: those.

    Attributes:
        copies: of the holders' dicts, in their order (:meth:`Holders.dicts`); of modules without
            hooks only what runs read.
        maps, lists, sets, cells, spots: what the containers and names held.
        hooks: those on modules that had none; ``None`` where they had none.
        states: of the objects that have one.
    """

    __slots__ = (
        "_is_all",
        "_marks",
        "cells",
        "copies",
        "hooks",
        "lists",
        "maps",
        "sets",
        "spots",
        "states",
    )

    def __init__(self, holders: Holders) -> None:
        dicts = holders.dicts()
        read = len(holders.hookless)
        self.copies = [*map(read_by_runs, dicts[:read]), *(own.copy() for own in dicts[read:])]
        self.spots = _read_all(holders.spots)
        self.maps: list[dict[Any, Any]] = list(map(entries_of, holders.maps))
        self.lists: list[list[Any]] = list(map(items_of, holders.lists))
        self.sets: list[set[Any]] = [set(items_of(group)) for group in holders.sets]
        self.cells = [tuple(contents_of(cell)) for cell in holders.cells]
        self.states = [keeper.read(value) for value, keeper in holders.objects]
        self.hooks = _hooks_on(holders.hookless)
        # Of dicts alone: those of derived classes may have an order of their own.
        self._marks = holders.marks() if {dict}.issuperset(map(type, dicts)) else None
        others = self.maps or self.lists or self.sets or self.cells or self.spots or self.states
        self._is_all = not others

    @classmethod
    def known(cls, copies: list[dict[str, Any]], spots: list[Any], inner: Inner | None) -> Contents:
        """Contents that were noted before, in part: there were no hooks, and nothing else.

        Args:
            copies, spots: as the attributes of these names.
            inner: maps, lists and sets, as they were.
        """
        made = cls.__new__(cls)
        made.copies, made.spots = copies, spots
        inner = Inner() if inner is None else inner
        made.maps, made.lists, made.sets = inner.maps, inner.lists, inner.sets
        made.cells, made.states, made.hooks, made._marks = [], [], None, None
        made._is_all = False
        return made

    def held_by(self, holders: Holders) -> bool:
        """Whether they hold the same now, object by object."""
        now, was = holders, self
        # Nearly always the marks are the same, and tell that without a look at any value.
        marked = self._marks is not None and now.marks() == self._marks
        if not (marked or self._same_dicts(now)) or _hooks_on(now.hookless) != self.hooks:
            return False
        if self._is_all:
            return True
        return (
            (not was.spots or all(map(is_, _read_all(now.spots), was.spots)))
            and (not was.maps or (_same_values(now.maps, was.maps) and _same(now.maps, was.maps)))
            and (not was.lists or _same(now.lists, was.lists))
            and (not was.sets or all(a == b for a, b in zip(now.sets, was.sets, strict=True)))
            and (not was.cells or _same(map(contents_of, now.cells), was.cells))
            and not any(was.moved(now))
        )

    def _same_dicts(self, now: Holders) -> bool:
        dicts, copies, read = now.dicts(), self.copies, len(now.hookless)
        attributes = map(read_by_runs, now.hookless)
        return all(map(_same_attributes, attributes, copies[:read])) and _same_values(
            dicts[read:], copies[read:]
        )

    def moved(self, holders: Holders) -> Iterator[tuple[Any, Keeper, Any]]:
        """Objects whose state is another now: how it is kept, and what it was."""
        for (value, keeper), state in zip(holders.objects, self.states, strict=True):
            if not keeper.same(state, keeper.read(value)):
                yield value, keeper, state

    def put_into(self, holders: Holders) -> None:
        """Make them hold this again."""
        read, tensors = len(holders.hookless), len(holders.parameters) + len(holders.buffers)
        dicts = list(zip(holders.dicts(), self.copies, strict=True))
        for own, held in dicts[:read]:
            now = read_by_runs(own)
            if not _same_attributes(now, held):
                for key in now.keys() - held.keys():
                    del own[key]
                own.update(held)
        for own, held in dicts[read : len(dicts) - tensors]:
            if not _same_values([own], [held]):
                for key in own.keys() - held.keys():
                    del own[key]
                own.update(held)
        for parameters, held in dicts[len(dicts) - tensors :]:
            _fill_tensors(parameters, held)
        if _hooks_on(holders.hookless) != self.hooks:
            for number, own in enumerate(holders.hookless):
                for name in FORWARD_HOOKS:
                    _fill_mapping(own[name], self.hooks[number][name] if self.hooks else {})
        for mapping, held in zip(holders.maps, self.maps, strict=True):
            if not (_same_values([mapping], [held]) and _same([mapping], [held])):
                _fill_mapping(mapping, held)
        for sequence, kept in zip(holders.lists, self.lists, strict=True):
            if not _same([sequence], [kept]):
                _fill_sequence(sequence, kept)
        for members, group in zip(holders.sets, self.sets, strict=True):
            if members != group:
                members.clear()
                members.update(group)
        for cell, contents in zip(holders.cells, self.cells, strict=True):
            if not _same([contents_of(cell)], [contents]):
                _fill_cell(cell, contents)
        for (space, name, _), value in zip(holders.spots, self.spots, strict=True):
            if read_spot(space, name) is not value:
                write_spot(space, name, value)
        for thing, keeper, state in self.moved(holders):
            if keeper.write is not None:
                keeper.write(thing, state)


def _hooks_on(hookless: list[dict[str, Any]]) -> list[dict[str, dict[Any, Any]]] | None:
    """The hooks on modules that had none; ``None`` where they have none now."""
    for own in hookless:
        if own["_forward_hooks"] or own["_forward_pre_hooks"]:
            return [{name: own[name].copy() for name in FORWARD_HOOKS} for own in hookless]
    return None


#: Types of values that are the same where they are equal, made anew or not.
_BY_VALUE = frozenset((int, bool, str, bytes))


def _same_attributes(now: dict[str, Any], was: dict[str, Any]) -> bool:
    if now.keys() != was.keys():
        return False
    for name, value in was.items():
        found = now[name]
        if found is not value and not (
            type(found) is type(value) and type(value) in _BY_VALUE and found == value
        ):
            return False
    return True


def _same_values(now: list[dict[Any, Any]], was: list[dict[Any, Any]]) -> bool:
    if list(map(len, now)) != list(map(len, was)):
        return False
    values, others = map(dict.values, now), map(dict.values, was)
    return all(map(is_, chain.from_iterable(values), chain.from_iterable(others)))


def _same(now: Iterable[Iterable[Any]], was: Iterable[Iterable[Any]]) -> bool:
    """Whether iterables give the same objects."""
    return all(
        len(a) == len(b) and all(map(is_, a, b))
        for a, b in zip(map(items_of, now), map(items_of, was), strict=True)
    )


def _sharded(*values: Any) -> bool:
    """Whether a parameter's place is FSDP2's, which puts whole and sharded ones there in turn."""
    return any(autograd.is_distributed(value) for value in values)


def _fill_tensors(own: dict[str, Any], held: dict[str, Any]) -> None:
    """Have a module's dict of parameters or buffers hold what it held, but for sharded ones."""
    added = [key for key in own.keys() - held.keys() if not _sharded(own[key])]
    for key in added:
        del own[key]
    for key, value in held.items():
        found = own.get(key)
        if found is not value and not _sharded(found, value):
            own[key] = value


def _read_all(spots: list[Spot]) -> list[Any]:
    return [read_spot(space, name) for space, name, _ in spots]


def _fill_mapping(mapping: dict[Any, Any], held: dict[Any, Any]) -> None:
    # A subclass may refuse changes, as transformers' outputs do.
    base = mapping_class(mapping)
    base.clear(mapping)
    for key, value in held.items():
        base.__setitem__(mapping, key, value)


def _fill_sequence(sequence: Any, held: list[Any]) -> None:
    base: Any = list if isinstance(sequence, list) else collections.deque
    base.clear(sequence)
    base.extend(sequence, held)


def _fill_cell(cell: types.CellType, contents: tuple[Any, ...]) -> None:
    if contents:
        cell.cell_contents = contents[0]
    else:
        del cell.cell_contents
