"""A region's state at one moment: what holds it, and what that holds."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from ckpt_pass._torch.histories import has_history
from ckpt_pass.regions.contents import Contents
from ckpt_pass.regions.holders import Holders
from ckpt_pass.state.objects import Keeper


class Noted(Protocol):
    """The state of a region when this was made.

    Attributes:
        holders: of the state; of some kinds they are made when they are asked for.
        contents: what these held; likewise.
        tensors, objects, norms: as of the holders.
        has_no_hooks: whether it is certain that none of the modules had hooks around its forward.
    """

    @property
    def holders(self) -> Holders: ...

    @property
    def contents(self) -> Contents: ...

    @property
    def tensors(self) -> list[torch.Tensor]: ...

    @property
    def objects(self) -> list[tuple[Any, Keeper]]: ...

    @property
    def norms(self) -> bool: ...

    @property
    def has_no_hooks(self) -> bool: ...

    def movable(self) -> list[torch.Tensor]:
        """Those of the tensors that may be given other memory and are seen to be."""
        ...

    def histories(self) -> list[torch.Tensor]:
        """The tensors that ops have made."""
        ...

    def is_still_held(self) -> bool:
        """Whether the holders hold the same now, object by object."""
        ...


class Searched:
    """The state behind holders that were looked for.

    Args:
        holders: those.
    """

    __slots__ = ("contents", "holders")
    has_no_hooks = False

    def __init__(self, holders: Holders) -> None:
        self.holders = holders
        self.contents = Contents(holders)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors that are held."""
        return self.holders.tensors

    @property
    def objects(self) -> list[tuple[Any, Keeper]]:
        """Those with a state of their own."""
        return self.holders.objects

    @property
    def norms(self) -> bool:
        """Whether a normalisation that may have running statistics is among the modules."""
        return self.holders.norms

    def movable(self) -> list[torch.Tensor]:
        """Those that may be given other memory and are seen to be."""
        return self.holders.movable()

    def histories(self) -> list[torch.Tensor]:
        """The tensors that ops have made."""
        return list(filter(has_history, self.tensors))

    def is_still_held(self) -> bool:
        """Whether the holders hold the same now, object by object."""
        return self.contents.held_by(self.holders)
