"""Steps from dicts to the plain objects and containers in them, as names: nothing is held."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any

from ckpt_pass.regions.kinds import ATOMS, Kind, kind_of
from ckpt_pass.state.spots import slots_of

#: What is followed, by kind, and the only type of it where others may do more than hold.
_FOLLOWED: dict[Kind, type | None] = {
    Kind.OBJECT: None,
    Kind.DICT: dict,
    Kind.LIST: list,
    Kind.SET: set,
}


@dataclass(slots=True)
class Inner:
    """The holders behind some steps.

    Attributes:
        fields: dicts of objects' attributes.
        maps, lists, sets: containers.
    """

    fields: list[dict[str, Any]] = field(default_factory=list)
    maps: list[dict[Any, Any]] = field(default_factory=list)
    lists: list[list[Any]] = field(default_factory=list)
    sets: list[set[Any]] = field(default_factory=list)

    def copied(self) -> Inner:
        """What the containers hold now."""
        return Inner(
            [], list(map(dict, self.maps)), list(map(list, self.lists)), [*map(set, self.sets)]
        )

    def holds(self, was: Inner) -> bool:
        """Whether lists and sets hold what they held, object by object; maps have marks."""
        lists = zip(self.lists, was.lists, strict=True)
        return self.sets == was.sets and all(
            len(now) == len(held) and all(map(is_, now, held)) for now, held in lists
        )


@dataclass(frozen=True, slots=True)
class Step:
    """A value in a dict.

    Attributes:
        source: the number of the dict: of those that the way begins with, then of those that its
            steps lead to.
        name: the value's key.
        kind: of the value.
        type_id: the ``id`` of its type.
    """

    source: int
    name: str | int
    kind: Kind
    type_id: int


def steps_from(dicts: Sequence[dict[Any, Any]], left_out: Iterable[int]) -> list[Step]:
    """The steps from some dicts to all plain objects and containers that they lead to.

    Args:
        dicts: where the way begins.
        left_out: the ``id`` of values that are not followed.
    """
    seen, steps = set(left_out), []
    sources = list(dicts)
    for number, source in enumerate(sources):  # grows
        for name, value in source.items():
            kind = kind_of(type(value))
            if kind not in _FOLLOWED or id(value) in seen or type(name) not in (str, int):
                continue
            seen.add(id(value))
            if _FOLLOWED[kind] not in (None, type(value)) or slots_of(type(value)):
                continue
            steps.append(Step(number, name, kind, id(type(value))))
            if kind is Kind.OBJECT and type(getattr(value, "__dict__", None)) is dict:
                sources.append(value.__dict__)
            elif kind is Kind.DICT:
                sources.append(value)
    return steps


def inner_of(steps: Sequence[Step], dicts: Sequence[dict[Any, Any]]) -> Inner | None:
    """What the steps lead to now; ``None`` where another value is in the place of one."""
    inner, sources = Inner(), list(dicts)
    for step in steps:
        value: Any = sources[step.source].get(step.name)
        if id(type(value)) != step.type_id:
            return None
        if step.kind is Kind.OBJECT:
            own = getattr(value, "__dict__", None)
            if type(own) is dict:
                inner.fields.append(own)
                sources.append(own)
        elif step.kind is Kind.DICT:
            inner.maps.append(value)
            sources.append(value)
        elif not ATOMS.issuperset(map(type, value)):
            return None
        elif step.kind is Kind.LIST:
            inner.lists.append(value)
        else:
            inner.sets.append(value)
    return inner
