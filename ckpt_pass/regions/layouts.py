"""What dicts hold, told without holding it, as far as it may lead to a module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckpt_pass.regions.kinds import VALUES


@dataclass(slots=True)
class Layout:
    """Where the values of some dicts are to be had, when the dicts hold others.

    Numbers, flags and their like are kept here. Modules, tensors and dicts are at hand where the
    dicts were found. All else is taken out of the dicts, for as long as it may be asked for.

    Attributes:
        keys: of each dict.
        kept: values that lead nowhere.
        places: of the others: in what is at hand, followed by what was taken.
        taken: what is to be taken: the number of the dict, and the key.
    """

    keys: list[tuple[Any, ...]] = field(default_factory=list)
    kept: list[dict[Any, Any]] = field(default_factory=list)
    places: list[dict[Any, int]] = field(default_factory=list)
    taken: list[tuple[int, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, dicts: Iterable[Mapping[Any, Any]], at_hand: Sequence[Any]) -> Layout:
        """The layout of some dicts.

        Args:
            dicts: those.
            at_hand: what need not be taken.
        """
        made, known = cls(), {id(value): place for place, value in enumerate(at_hand)}
        for number, own in enumerate(dicts):
            kept, places = {}, {}
            for key, value in own.items():
                if id(value) in known:
                    places[key] = known[id(value)]
                elif _leads_nowhere(value):
                    kept[key] = value
                else:
                    places[key] = len(at_hand) + len(made.taken)
                    made.taken.append((number, key))
            made.keys.append(tuple(own))
            made.kept.append(kept)
            made.places.append(places)
        return made

    def copies(self, values: Sequence[Any]) -> list[dict[Any, Any]]:
        """What the dicts held.

        Args:
            values: what was at hand, and what was taken.
        """
        return [
            {key: kept[key] if key in kept else values[places[key]] for key in keys}
            for keys, kept, places in zip(self.keys, self.kept, self.places, strict=True)
        ]


def _leads_nowhere(value: Any) -> bool:
    cls = type(value)
    return cls in VALUES or (cls is tuple and VALUES.issuperset(map(type, value)))
