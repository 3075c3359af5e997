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
from ckpt_pass.state.code_names import contents_of
from ckpt_pass.state.objects import Keeper
from ckpt_pass.state.spots import read_spot, write_spot

_dict_values = dict.values


class Contents:
    """What a number of holders hold at a moment, by reference."""

    __slots__ = (
        "_is_all",
        "_marks",
        "_simple",
        "attributes",
        "buffers",
        "cells",
        "lists",
        "maps",
        "parameters",
        "sets",
        "spots",
        "states",
    )

    def __init__(self, holders: Holders, marks: list[int] | None = None) -> None:
        self.attributes: list[dict[str, Any]] = [own.copy() for own in holders.attributes]
        self.parameters: list[dict[str, Any]] = [own.copy() for own in holders.parameters]
        self.buffers: list[dict[str, Any]] = [own.copy() for own in holders.buffers]
        self.maps: list[dict[Any, Any]] = list(map(dict, holders.maps))
        self.lists: list[list[Any]] = list(map(list, holders.lists))
        self.sets: list[set[Any]] = list(map(set, holders.sets))
        self.cells = [tuple(contents_of(cell)) for cell in holders.cells]
        self.spots = _read_all(holders.spots)
        self.states: list[Any] = [keeper.read(value) for value, keeper in holders.objects]
        #: Of dicts alone: those of derived classes may have an order of their own.
        self._marks = marks
        if marks is None and {dict}.issuperset(map(type, holders.dicts())):
            self._marks = holders.marks()
        self._simple = holders.simple
        others = self.maps or self.lists or self.sets or self.cells or self.spots or self.states
        self._is_all = not others

    def held_by(self, holders: Holders) -> bool:
        """Whether they hold the same now, object by object."""
        now, was = holders, self
        # Nearly always the marks are the same, and tell that without a look at any value.
        marked = self._marks is not None and now.marks() == self._marks
        if not (marked or self._same_dicts(now)):
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
        if self._simple:
            # Values compare at no risk: lists of the same objects are equal before any is asked.
            try:
                return _values(now) == _values(self)
            except (RuntimeError, TypeError, ValueError):  # an array in the place of a number
                return False
        return (
            _same_values(now.attributes, self.attributes)
            and _same_values(now.parameters, self.parameters)
            and _same_values(now.buffers, self.buffers)
        )

    def moved(self, holders: Holders) -> Iterator[tuple[Any, Keeper, Any]]:
        """Objects whose state is another now: how it is kept, and what it was."""
        for (value, keeper), state in zip(holders.objects, self.states, strict=True):
            if not keeper.same(state, keeper.read(value)):
                yield value, keeper, state

    def put_into(self, holders: Holders) -> None:
        """Make them hold this again."""
        for own, held in zip(holders.attributes, self.attributes, strict=True):
            if not _same_values([own], [held]):
                for key in own.keys() - held.keys():
                    del own[key]
                own.update(held)
        places = chain(
            zip(holders.parameters, self.parameters, strict=True),
            zip(holders.buffers, self.buffers, strict=True),
        )
        for parameters, held in places:
            for key, value in held.items():
                now = parameters.get(key)
                if now is not value and not _sharded(now, value):
                    parameters[key] = value
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


def _values(held: Holders | Contents) -> list[Any]:
    """Attributes by value; parameters and buffers, which have an ``==`` of their own, by ``id``."""
    tensors = held.parameters + held.buffers if held.buffers else held.parameters
    return [
        *map(len, held.attributes),
        *map(len, tensors),
        *chain.from_iterable(map(_dict_values, held.attributes)),
        *map(id, chain.from_iterable(map(_dict_values, tensors))),
    ]


def _same_values(now: list[dict[Any, Any]], was: list[dict[Any, Any]]) -> bool:
    if list(map(len, now)) != list(map(len, was)):
        return False
    values, others = map(dict.values, now), map(dict.values, was)
    return all(map(is_, chain.from_iterable(values), chain.from_iterable(others)))


def _same(now: Iterable[Iterable[Any]], was: Iterable[Iterable[Any]]) -> bool:
    """Whether iterables give the same objects."""
    return all(
        len(a) == len(b) and all(map(is_, a, b))
        for a, b in zip(map(list, now), map(list, was), strict=True)
    )


def _sharded(*values: Any) -> bool:
    """Whether a parameter's place is FSDP2's, which puts whole and sharded ones there in turn."""
    return any(autograd.is_distributed(value) for value in values)


def _read_all(spots: list[Spot]) -> list[Any]:
    return [read_spot(space, name) for space, name, _ in spots]


def _fill_mapping(mapping: dict[Any, Any], held: dict[Any, Any]) -> None:
    # A subclass may refuse changes, as transformers' outputs do.
    base: Any = collections.OrderedDict if isinstance(mapping, collections.OrderedDict) else dict
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
