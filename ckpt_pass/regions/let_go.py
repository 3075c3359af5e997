"""What stands for what a forward has replaced: the same values, without the graphs they came from.

What a run leaves on an attribute holds the run's graph, and that the run's state. If this held what
the run before had left, each run would hold all that were before, for good where no backward comes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ckpt_pass._torch import autograd
from ckpt_pass.regions.holders import Holders


def stand_ins_for(was: Holders, now: Holders) -> dict[int, Any]:
    """By its ``id``, what stands for each tensor with a history that is no longer held.

    And for the lists and dicts that are not held any more either: copies with the stand-ins.

    Args:
        was: the holders when the forward began.
        now: those that are found when it ends.
    """
    held = set(map(id, (*now.tensors, *now.lists, *now.maps)))
    noted = (tensor for tensor in was.tensors if not tensor.is_leaf)
    found: dict[int, Any] = {
        id(tensor): autograd.with_cut_history(tensor) for tensor in noted if id(tensor) not in held
    }
    if not found:
        return found
    lists = [one for one in was.lists if type(one) is list and id(one) not in held]
    maps = [one for one in was.maps if type(one) is dict and id(one) not in held]
    found |= {id(one): type(one)() for one in (*lists, *maps)}
    for sequence in lists:
        found[id(sequence)].extend(in_places(sequence, found))
    for mapping in maps:
        found[id(mapping)].update(zip(mapping, in_places(mapping.values(), found), strict=True))
    return found


def in_places(values: Iterable[Any], instead: Mapping[int, Any]) -> list[Any]:
    """Values, others in the places of some by their ``id``, in tuples as well."""
    return [_in_place(value, instead) for value in values]


def _in_place(value: Any, instead: Mapping[int, Any]) -> Any:
    if type(value) is tuple:
        parts = tuple(in_places(value, instead))
        same = all(one is other for one, other in zip(parts, value, strict=True))
        return value if same else parts
    return instead.get(id(value), value)
