"""Placements whose modules keep a part of what enters them on each rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from ckpt_pass.modules.choice import Choice, Placement, PlacementError
from ckpt_pass.offloading.sharding import Sharding


@dataclass(frozen=True)
class Sharded:
    """Another placement's modules, of whose inputs each rank of a group keeps a part.

    The modules are recomputed; the activations that enter them, which all ranks of the group hold
    alike, are gathered for that (Megatron's ``distribute_saved_activations``, DeepSpeed's
    ``partition_activations``).

    Attributes:
        placement: which modules.
        sharding: over which ranks, and which of the arguments.

    Raises:
        PlacementError: one of them is something else.
    """

    placement: Placement
    sharding: Sharding = field(default_factory=Sharding)

    name: ClassVar[str] = "sharded"
    says: ClassVar[str] = "another placement's modules, whose inputs are sharded over ranks"

    def __post_init__(self) -> None:
        if not isinstance(self.placement, Placement) or isinstance(self.placement, type):
            raise PlacementError(
                f"Got {self.placement!r} of type {type(self.placement).__name__} as the placement "
                "of modules whose inputs are sharded, expected a placement: "
                "ckpt_pass.as_placement(name)."
            )
        if not isinstance(self.sharding, Sharding):
            raise PlacementError(
                f"Got {self.sharding!r} of type {type(self.sharding).__name__} as the sharding, "
                "expected ckpt_pass.Sharding(group)."
            )

    def choose(self, model: nn.Module) -> Choice:
        """Decide (:class:`~ckpt_pass.modules.choice.Placement`).

        Raises:
            PlacementError: the placement does not fit the model, or offloads.
        """
        return self.placement.choose(model).with_shards(self.sharding)
