"""Regions in a row that are recomputed together: a segment keeps what enters its first region.

Between the modules of a segment stands the model's own code, which cannot be run again. So each
module stays a region of its own, but an argument that *is* the tensor which the region before has
returned is not kept: the region remembers who made it. When its values are asked for, the regions
from the segment's first one on run again. Whether the tensor is the same object, and unchanged, is
looked at in every run; what comes from anywhere else is kept as in any region. So is the tensor of
a region whose parameters are not there any more when the next one runs: FSDP2 takes a layer's
parameters away after its forward, and would bring them back for its own backward only.

The method is sqrt(n) checkpointing (Chen et al., arXiv:1604.06174) where segments are that long;
``nested`` is its second level.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from operator import is_
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ckpt_pass._torch import autograd
from ckpt_pass.regions.arguments import Arguments, Made
from ckpt_pass.regions.frame import Frame, RegionOptions


def _linked(value: Any, made: dict[int, int]) -> Any:
    number = made.get(id(value)) if isinstance(value, torch.Tensor) else None
    return value if number is None else Made(number, value.requires_grad)


def _tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):  # nearly always
        return [output]
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


class ChainedFrame(Frame):
    """One run of a region in a segment."""

    __slots__ = (
        "_before",
        "_candidates",
        "_module",
        "_nested",
        "_outputs",
        "_parameters",
        "_ready",
    )

    def __init__(
        self,
        fn: Callable[..., Any],
        options: RegionOptions,
        module: nn.Module,
        candidates: tuple[ChainedFrame, ...],
        nested: bool,
    ) -> None:
        super().__init__(fn, options)
        self._module = module
        #: Those it runs with: other objects stand in their places while FSDP2 has them sharded.
        self._parameters = tuple(module.parameters())
        self._candidates = candidates
        self._before: ChainedFrame | None = None
        self._nested = nested
        self._outputs: list[tuple[weakref.ref[torch.Tensor], int]] = []
        #: The outputs of the region before, between a nested run and this region's own.
        self._ready: list[torch.Tensor] | None = None

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the region; what autograd saves inside is not kept, nor what the one before made."""
        output = super().forward(args, kwargs)
        self._outputs = [
            (weakref.ref(t), t._version) for t in _tensors(output) if not t.is_inference()
        ]
        return output

    def _kept(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], as_they_are: bool = False
    ) -> Arguments:
        candidates, self._candidates = self._candidates, ()
        # Hooks around the region (an outer region, offloading) decide how its arguments are kept.
        if autograd.saved_hooks() is not None:
            return super()._kept(args, kwargs)
        # Nothing is put away, or taken apart, that may be made again.
        kept = super()._kept(args, kwargs, as_they_are=True)
        for before in candidates:
            made = before._there()
            linked = tuple(_linked(v, made) for v in args)
            named = {key: _linked(v, made) for key, v in kwargs.items()}
            if any(isinstance(v, Made) for v in (*linked, *named.values())):
                self._before = before
                devices = kept.devices  # those of the tensors that are not kept too
                kept = super()._kept(linked, named)
                kept.devices = devices
                return kept
        return super()._kept(args, kwargs) if self._options.moves_its_own else kept

    def _there(self) -> dict[int, int]:
        """The numbers of the outputs that are there still, unchanged, by identity.

        None where the region could not be run again now.
        """
        now = tuple(self._module.parameters())
        if len(now) != len(self._parameters) or not all(map(is_, now, self._parameters)):
            return {}
        return {
            id(tensor): number
            for number, (found, version) in enumerate(self._outputs)
            if (tensor := found()) is not None and tensor._version == version
        }

    def _fill(self) -> None:
        chain = list(reversed(list(self._back_to_what_is_there())))
        made = chain[0]._ready
        for frame, following in pairwise(chain):
            outputs = _tensors(frame._rerun(*frame._filled_in(made), to_end=True))
            made = list(map(autograd.without_history, outputs))
            del outputs  # and the graph that made them
            if self._nested:
                frame._store = []
                following._ready = made
        self._rerun(*self._filled_in(made))
        self._ready = None

    def _back_to_what_is_there(self) -> Iterator[ChainedFrame]:
        frame: ChainedFrame | None = self
        while frame is not None:
            yield frame
            frame = frame._before if frame._ready is None else None

    def _filled_in(self, made: list[torch.Tensor] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, with the outputs of the region before in their places."""
        args, kwargs = self._arguments.again()
        if made is None:
            return args, kwargs
        tensors = made

        def real(value: Any) -> Any:
            if not isinstance(value, Made):
                return value
            found = tensors[value.number]
            return autograd.with_history(found) if value.requires_grad else found

        return tuple(map(real, args)), {key: real(value) for key, value in kwargs.items()}


class Link:
    """A region's place in a segment; pickled and copied with its module.

    Args:
        module: the region's module.
        before: the places of the regions whose output it may take; none for the first of a segment.
        nested: make the outputs of the segment's regions first, and keep those, then the values of
            one region at a time: each but the last runs three times, but the values of one region
            only are there at once. Else all regions run again at once.
    """

    def __init__(self, module: nn.Module, before: tuple[Link, ...], nested: bool) -> None:
        self._module = module
        self._before = before
        self._nested = nested
        self._latest: weakref.ref[ChainedFrame] | None = None

    def frame(self, fn: Callable[..., Any], options: RegionOptions) -> ChainedFrame:
        """A frame for a run that begins now."""
        running = [link._latest() for link in self._before if link._latest is not None]
        before = tuple(frame for frame in running if frame is not None)
        frame = ChainedFrame(fn, options, self._module, before, self._nested)
        self._latest = weakref.ref(frame)
        return frame

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_latest": None}
