"""The layers whose activations weigh most, until a target is met, from measured bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from ckpt_pass.modules.choice import Choice, ModuleChoice, PlacementError, Segment
from ckpt_pass.modules.layers.layer_profile import LayerProfile
from ckpt_pass.modules.optimal import check_profiles


@dataclass(frozen=True)
class AutoMemory:
    """The heaviest layers, until the layers keep no more than a target.

    What a layer keeps is what its autograd saves (``activation_bytes``) and its output; a layer
    that is recomputed keeps its input alone, which is its predecessor's output.

    Attributes:
        target: the most that all layers keep together: bytes as an ``int``, a fraction of what they
            keep without regions as a ``float`` (one half by default).
        profiles: of the model's layers; measured from ``example_inputs`` by
            :func:`ckpt_pass.apply` where empty.

    Raises:
        PlacementError: the target is no amount.
    """

    target: int | float = 0.5
    profiles: tuple[LayerProfile, ...] = ()

    name: ClassVar[str] = "auto-memory"
    says: ClassVar[str] = "the layers that keep most, until a target is met, from layer profiles"

    def __post_init__(self) -> None:
        fraction = isinstance(self.target, float)
        if isinstance(self.target, bool) or self.target < 0 or (fraction and self.target > 1):
            raise PlacementError(
                f"Got auto-memory with target={self.target!r}, expected bytes as an int, or a "
                "fraction from 0.0 to 1.0 of what the layers keep."
            )

    def with_profiles(self, profiles: tuple[LayerProfile, ...]) -> AutoMemory:
        """The same with profiles."""
        return replace(self, profiles=profiles)

    def choose(self, model: nn.Module) -> Choice:
        """Decide (:class:`~ckpt_pass.modules.choice.Placement`).

        Raises:
            LayerProfileError: profiles are missing, or name other modules than the model has.
            PlacementError: the target is less than what is kept with every layer recomputed.
        """
        modules = check_profiles(self.profiles, model, self.name)
        outputs = sum(profile.output_bytes for profile in self.profiles)
        kept = outputs + sum(profile.activation_bytes for profile in self.profiles)
        fraction = isinstance(self.target, float)
        target = int(self.target * kept) if fraction else int(self.target)
        if target < outputs:
            raise PlacementError(
                f"auto-memory cannot meet {target:,} bytes: with every layer recomputed their "
                f"outputs stay, {outputs:,} bytes of {kept:,}. Expected a target of at least that; "
                "segments keep less."
            )
        order = sorted(self.profiles, key=lambda profile: -profile.activation_bytes)
        inside = set()
        for profile in order:
            if kept <= target:
                break
            kept -= profile.activation_bytes
            inside.add(profile.name)
        found = tuple(
            ModuleChoice(
                profile.name,
                type(modules[profile.name]).__name__,
                profile.name in inside,
                f"{profile.activation_bytes:,} bytes"
                + ("" if profile.name in inside else ": kept, the target is met"),
            )
            for profile in self.profiles
        )
        segments = tuple(Segment((one.name,)) for one in found if one.inside)
        return Choice(f"{self.name}({kept:,} of {target:,} bytes kept)", found, segments)
