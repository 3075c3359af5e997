"""Make modules of a model checkpoint regions, and undo it, without editing the model.

A region module gets a ``forward`` of its own as an instance attribute. Parameters, buffers,
``state_dict`` keys, hooks and the class stay as they are; hooks on the module run outside of the
region, once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ckpt_pass._errors import CkptPassError, nearest
from ckpt_pass._torch.modules import script_forward
from ckpt_pass.regions.chain import Link
from ckpt_pass.regions.checkpointing import RegionSpec as RegionSpec
from ckpt_pass.regions.checkpointing import options_for, with_moves
from ckpt_pass.regions.running import run_region
from ckpt_pass.regions.writes import forget


class UnknownRegionError(CkptPassError):
    """A region's module is not in the model."""


class AlreadyAppliedError(CkptPassError):
    """A module is a checkpoint region already."""


class NotAppliedError(CkptPassError):
    """There is nothing to remove."""


class SegmentError(CkptPassError):
    """Regions that cannot be recomputed together as asked."""


class RegionForward:
    """The ``forward`` of a module that is a region; pickled and deep-copied with its module."""

    def __init__(self, module: nn.Module, name: str, spec: RegionSpec) -> None:
        self.module = module
        options = options_for(module, spec.policy, spec.keeps, name)
        self.options = replace(with_moves(options, spec), draws=spec.draws)
        #: Its place in a segment of regions that are recomputed together, if it has one.
        self.link: Link | None = None
        #: An instance attribute that was there before (other libraries wrap ``forward`` too).
        self.before = module.__dict__.get("forward")
        self.is_script = isinstance(module, torch.jit.ScriptModule)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward as it was."""
        if self.before is not None:
            return self.before(*args, **kwargs)
        if self.is_script:
            return script_forward(self.module)(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return run_region(self.run, args, kwargs, self.options, self.link)


def regions_of(model: nn.Module) -> dict[str, RegionForward]:
    """The regions that are applied to a model, by FQN."""
    found = {}
    for name, module in model.named_modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, RegionForward):
            found[name] = forward
    return found


def apply_regions(model: nn.Module, regions: Mapping[str, RegionSpec]) -> None:
    """Make modules checkpoint regions; all of them or, where one cannot be, none.

    Args:
        model: the root that names are relative to.
        regions: what becomes of each, by FQN.

    Raises:
        UnknownRegionError: the model has no module of that name.
        AlreadyAppliedError: a module is a region already.
        SegmentError: regions of a segment out of order, or nested with a policy.
    """
    check_regions(model, regions)
    modules = dict(model.named_modules())
    forwards = {name: RegionForward(modules[name], name, spec) for name, spec in regions.items()}
    _link(forwards, regions)
    for name, forward in forwards.items():
        modules[name].forward = forward


def check_regions(model: nn.Module, regions: Mapping[str, RegionSpec]) -> None:
    """Raise as :func:`apply_regions` would; change nothing.

    Raises:
        UnknownRegionError: the model has no module of that name.
        AlreadyAppliedError: a module is a region already.
    """
    modules = dict(model.named_modules())
    for name in regions:
        if name not in modules:
            raise UnknownRegionError(
                f"{type(model).__name__} has no module {name!r}.{nearest(name, modules)} Expected "
                f"the names of its {len(modules)} modules, as named_modules() gives them."
            )
    taken = [name for name in regions if _region_forward(modules[name]) is not None]
    if taken:
        raise AlreadyAppliedError(
            f"Module {taken[0]!r} is a checkpoint region already (and {len(taken) - 1} others). "
            "Expected a model without regions. Remove the applied plan first."
        )


def _link(forwards: Mapping[str, RegionForward], regions: Mapping[str, RegionSpec]) -> None:
    """Join regions to segments."""
    followed = {name for spec in regions.values() for name in spec.follows}
    for name, spec in regions.items():  # in the order of execution
        if not spec.follows and name not in followed:
            continue
        before = [forwards[other].link for other in spec.follows if other in forwards]
        links = tuple(link for link in before if link is not None)
        if len(links) < len(spec.follows):
            raise SegmentError(
                f"Region {name!r} follows {', '.join(spec.follows)}, expected regions that stand "
                "before it: those of a segment in the order of execution."
            )
        if spec.nested and (spec.policy is not None or spec.keeps is not None):
            raise SegmentError(
                f"Region {name!r} belongs to a segment that is recomputed twice (nested) and has a "
                "policy. Expected one of the two: what a policy keeps is handed out once. Leave "
                "the policy out, or recompute the segment once (nested=False)."
            )
        forwards[name].link = Link(forwards[name].module, links, spec.nested)


def _region_forward(module: nn.Module) -> RegionForward | None:
    forward = module.__dict__.get("forward")
    return forward if isinstance(forward, RegionForward) else None


def remove_regions(model: nn.Module) -> None:
    """Give every region of a model its own ``forward`` back.

    Raises:
        NotAppliedError: the model has no region.
    """
    found = regions_of(model)
    if not found:
        raise NotAppliedError(
            f"{type(model).__name__} has no checkpoint region, so there is nothing to remove. "
            "Expected a model that a plan with regions was applied to (plan.regions may be empty)."
        )
    for region in found.values():
        if region.before is not None:
            region.module.forward = region.before
        else:
            del region.module.forward
        forget(region.module)


@contextlib.contextmanager
def applied_regions(model: nn.Module, regions: Mapping[str, RegionSpec]) -> Iterator[nn.Module]:
    """The same inside a ``with`` block only."""
    apply_regions(model, regions)
    try:
        yield model
    finally:
        if regions:
            remove_regions(model)
