"""What stands in, for the time of a recomputation, for things that a region's state holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckpt_pass.regions.holders import Holders
from ckpt_pass.state.code_names import contents_of
from ckpt_pass.state.raw import items_of
from ckpt_pass.state.spots import read_spot, write_spot


def held_now(holders: Holders) -> Iterator[Any]:
    """What the holders hold now, those that FSDP2 has taken away excepted."""
    for mapping in holders.mappings():
        yield from dict.values(mapping)
    for sequence in (*holders.lists, *holders.sets):
        yield from items_of(sequence)
    for cell in holders.cells:
        yield from contents_of(cell)
    for space, name, _ in holders.spots:
        yield read_spot(space, name)


def put_in_place(stand_ins: Mapping[int, Any], holders: Holders) -> None:
    """Let the holders hold others.

    Args:
        stand_ins: what takes the places of things, by their id.
        holders: all of them; tensors in sets have none.
    """
    for mapping in holders.mappings():
        found = {k: stand_ins[id(v)] for k, v in dict.items(mapping) if id(v) in stand_ins}
        for key, value in found.items():
            dict.__setitem__(mapping, key, value)
    for sequence in holders.lists:
        for index, value in enumerate(items_of(sequence)):
            if id(value) in stand_ins:
                sequence[index] = stand_ins[id(value)]
    for cell in holders.cells:
        for value in tuple(contents_of(cell)):
            if id(value) in stand_ins:
                cell.cell_contents = stand_ins[id(value)]
    for space, name, _ in holders.spots:
        value = read_spot(space, name)
        if id(value) in stand_ins:
            write_spot(space, name, stand_ins[id(value)])
