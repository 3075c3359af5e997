"""Placements over the layers of a model, in their order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from ckpt_pass.modules.choice import Choice, ModuleChoice, PlacementError, Segment
from ckpt_pass.modules.layers.find import Layers, find_layers
from ckpt_pass.modules.segments import by_units
from ckpt_pass.policy.rules import PolicyLike


def by_position(placement: str, layers: Layers, decide: Callable[[int], str | None]) -> Choice:
    """Choose layers one by one.

    Args:
        placement: as it prints.
        layers: those of the model.
        decide: from a layer's number to why it is in; ``None`` where it is out.
    """
    found = []
    for number, (name, kind) in enumerate(zip(layers.names, layers.kinds, strict=True)):
        why = decide(number)
        found.append(ModuleChoice(name, kind, why is not None, why or f"layer {number}: not asked"))
    chosen = tuple(Segment((one.name,)) for one in found if one.inside)
    return Choice(placement, tuple(found), chosen)


def by_turns(placement: str, layers: Layers, decide: Callable[[int], str | None]) -> Choice:
    """Choose layers one by one; where some are bare, what :func:`by_units` makes of them.

    Args:
        placement, layers, decide: as for :func:`by_position`; ``decide`` is asked for segments,
            by their numbers, where there are bare layers.
    """
    if not layers.has_bare:
        return by_position(placement, layers, decide)
    units = by_units(placement, layers)
    kept = tuple(s for number, s in enumerate(units.segments) if decide(number) is not None)
    names = {name for segment in kept for name in segment.names}
    found = tuple(
        one if not one.inside or one.name in names else replace(one, inside=False, why=_OTHERS_TURN)
        for one in units.modules
    )
    return replace(units, modules=found, segments=kept)


_OTHERS_TURN = "bare layers are taken in segments, and this one is not asked"


@dataclass(frozen=True)
class NoLayers:
    """No region at all: the plain step."""

    name: ClassVar[str] = "none"
    says: ClassVar[str] = "no region: the plain step"

    def choose(self, model: nn.Module) -> Choice:
        """Decide (:class:`~ckpt_pass.modules.choice.Placement`)."""
        return by_position(self.name, find_layers(model), lambda number: None)


@dataclass(frozen=True)
class AllLayers:
    """Every layer a region of its own; bare layers of an ``nn.Sequential`` several at a time.

    Attributes:
        policy: what they keep, if :func:`ckpt_pass.apply` is given none.
    """

    policy: PolicyLike | None = None

    name: ClassVar[str] = "all"
    says: ClassVar[str] = "every layer"

    def choose(self, model: nn.Module) -> Choice:
        """Decide (:class:`~ckpt_pass.modules.choice.Placement`)."""
        layers = find_layers(model)
        if layers.has_bare:
            return by_units(self.name, layers).with_policy(self.policy)
        choice = by_position(self.name, layers, lambda number: "every layer is")
        return choice.with_policy(self.policy)


@dataclass(frozen=True)
class EveryN:
    """One of every ``n`` layers, the first by default; bare layers are taken in segments.

    Attributes:
        n: 1 for all of them.
        offset: which of the ``n``, from 0.

    Raises:
        PlacementError: ``n`` is less than 1, or ``offset`` is not less than ``n``.
    """

    n: int = 3
    offset: int = 0

    name: ClassVar[str] = "every-n"
    says: ClassVar[str] = "the first of every n layers (every-3)"

    def __post_init__(self) -> None:
        if not 0 <= self.offset < self.n:
            raise PlacementError(
                f"Got every-n with n={self.n} and offset={self.offset}, expected n of 1 or more "
                "and an offset from 0 to n - 1."
            )

    def choose(self, model: nn.Module) -> Choice:
        """Decide (:class:`~ckpt_pass.modules.choice.Placement`)."""

        def decide(number: int) -> str | None:
            if number % self.n != self.offset:
                return None
            return f"layer {number} is number {self.offset} of every {self.n}"

        return by_turns(f"every-{self.n}", find_layers(model), decide)


@dataclass(frozen=True)
class Alternate:
    """Every second layer, the first one included; bare layers are taken in segments."""

    name: ClassVar[str] = "alternate"
    says: ClassVar[str] = "every second layer"

    def choose(self, model: nn.Module) -> Choice:
        """Decide (:class:`~ckpt_pass.modules.choice.Placement`)."""

        def decide(number: int) -> str | None:
            return None if number % 2 else f"layer {number} is even"

        return by_turns(self.name, find_layers(model), decide)


@dataclass(frozen=True)
class ChosenLayers:
    """Layers by their numbers.

    Attributes:
        indices: from 0; negative ones count from the end.
    """

    indices: tuple[int, ...]

    name: ClassVar[str] = "layers"
    says: ClassVar[str] = "layers by index (layers-0,2,-1)"

    def choose(self, model: nn.Module) -> Choice:
        """Decide (:class:`~ckpt_pass.modules.choice.Placement`).

        Raises:
            PlacementError: the model has no layer of such a number.
        """
        layers = find_layers(model)
        count = len(layers.names)
        wrong = [index for index in self.indices if not -count <= index < count]
        if wrong or not self.indices:
            raise PlacementError(
                f"Got the layer indices {list(self.indices)}, expected at least one, each from "
                f"{-count} to {count - 1}: {type(model).__name__} has {count} layers "
                f"({layers.names[0]} to {layers.names[-1]})."
            )
        asked = {index % count for index in self.indices}

        def decide(number: int) -> str | None:
            return f"layer {number} was asked for" if number in asked else None

        shown = ",".join(str(index) for index in self.indices)
        return by_position(f"layers-{shown}", layers, decide)
