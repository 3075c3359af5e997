"""The placements that have a name, and the way from what a user passes to a placement."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias, cast

from torch import nn

from ckpt_pass._errors import nearest
from ckpt_pass.modules.auto_memory import AutoMemory
from ckpt_pass.modules.by_layer import AllLayers, Alternate, ChosenLayers, EveryN, NoLayers
from ckpt_pass.modules.by_module import Auto, ByName, Custom, HeavyOps
from ckpt_pass.modules.choice import Choice as Choice
from ckpt_pass.modules.choice import Placement as Placement
from ckpt_pass.modules.choice import PlacementError
from ckpt_pass.modules.megatron import Megatron
from ckpt_pass.modules.offloaded import Offloaded, OffloadParts
from ckpt_pass.modules.optimal import OptimalSegments
from ckpt_pass.modules.segments import Segments, SqrtSegments
from ckpt_pass.modules.sharded import Sharded

#: What users may pass: a name, a placement, or a function ``module -> bool``.
PlacementLike: TypeAlias = "str | Placement | Callable[[nn.Module], bool]"


class UnknownPlacementError(PlacementError):
    """No placement has that name, or the object given is none."""


_CLASSES: tuple[type[Any], ...] = (
    NoLayers,
    AllLayers,
    Alternate,
    EveryN,
    ChosenLayers,
    ByName,
    Custom,
    HeavyOps,
    Auto,
    AutoMemory,
    SqrtSegments,
    Segments,
    OptimalSegments,
    Megatron,
    Offloaded,
    OffloadParts,
    Sharded,
)

#: Every placement by name.
PLACEMENTS: Mapping[str, type[Any]] = MappingProxyType({found.name: found for found in _CLASSES})

# Forms with a parameter in the name.
_FORMS: tuple[tuple[str, Callable[[str], Placement]], ...] = (
    (r"every-(\d+)", lambda text: EveryN(int(text))),
    (r"layers-(-?\d+(?:,-?\d+)*)", lambda text: ChosenLayers(tuple(map(int, text.split(","))))),
    (r"segments-(\d+)", lambda text: Segments(int(text))),
    (r"megatron-(selective|full)", lambda text: Megatron(text)),
    (r"auto-(\d+)", lambda text: Auto(int(text))),
)


def placements() -> Mapping[str, str]:
    """The placements by name, each with what it does."""
    return MappingProxyType({name: found.says for name, found in PLACEMENTS.items()})


def as_placement(placement: PlacementLike) -> Placement:
    """Turn what a user passed into a placement.

    Args:
        placement: a name (:func:`placements` lists them; ``every-3``, ``segments-4``,
            ``layers-0,2`` and ``auto-100000`` have their parameter in it), a placement, or a
            function ``module -> bool``.

    Raises:
        UnknownPlacementError: no placement has that name, it needs more than a name, or the object
            is none of these.
    """
    if isinstance(placement, str):
        return _named(placement)
    if isinstance(placement, Placement) and not isinstance(placement, type):
        return placement
    if callable(placement) and not isinstance(placement, type):
        return Custom(placement)
    raise UnknownPlacementError(
        f"Got {placement!r} of type {type(placement).__name__} as a placement. Give a name "
        f"({', '.join(PLACEMENTS)}), a placement, or a function from a module to a bool."
    )


def _named(name: str) -> Placement:
    for form, build in _FORMS:
        if found := re.fullmatch(form, name):
            return build(found[1])
    if name not in PLACEMENTS:
        raise UnknownPlacementError(
            f"There is no placement {name!r}.{nearest(name, PLACEMENTS)} Expected one of "
            f"{', '.join(PLACEMENTS)}; every-3, segments-4, layers-0,2 and auto-100000 have their "
            "parameter in the name."
        )
    chosen = PLACEMENTS[name]
    try:
        return cast(Placement, chosen())
    except (TypeError, PlacementError):
        raise UnknownPlacementError(
            f"The placement {name!r} ({chosen.says}) needs arguments, got its name alone. Expected "
            f"a value: ckpt_pass.{chosen.__name__}(...)."
        ) from None
