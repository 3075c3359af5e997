"""Make a placement's modules checkpoint regions of a model, undo it, and say what is in place."""

from __future__ import annotations

import contextlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from ckpt_pass._torch.modules import is_fsdp1
from ckpt_pass.compile.engine import OPEN
from ckpt_pass.eager.planning import plan_eager
from ckpt_pass.job.counting import Around
from ckpt_pass.job.jobs import JobLike
from ckpt_pass.job.totals import JobAsked, TotalLike, asked_job
from ckpt_pass.modules.choice import Choice, ModuleChoice, Placement, PlacementError, Segment
from ckpt_pass.modules.layers.find import find_layers
from ckpt_pass.modules.layers.layer_profile import LayerProfile
from ckpt_pass.modules.layers.profiling import profile_layers
from ckpt_pass.modules.placement import PlacementLike, as_placement
from ckpt_pass.offloading.options import check_offload_inputs
from ckpt_pass.offloading.sharding import ShardLike, as_sharding
from ckpt_pass.offloading.stores import OffloadLike, as_offload
from ckpt_pass.plans.budget import BudgetLike
from ckpt_pass.plans.goal import as_goal
from ckpt_pass.plans.value import Plan
from ckpt_pass.policy.rules import PolicyLike
from ckpt_pass.regions.wrapping import (
    AlreadyAppliedError,
    NotAppliedError,
    RegionSpec,
    apply_regions,
    regions_of,
    remove_regions,
)
from ckpt_pass.state.given import check_module

# Where an applied choice lives: a plain attribute of the model, which is pickled and copied with
# it and is no part of its state_dict.
_ATTRIBUTE = "_ckpt_pass_choice"

DEFAULT_PLACEMENT = "all"


@runtime_checkable
class NeedsProfiles(Placement, Protocol):
    """A placement that decides from measured layers."""

    profiles: tuple[LayerProfile, ...]

    def with_profiles(self, profiles: tuple[LayerProfile, ...]) -> Placement:
        """The same with profiles."""
        ...


class SharedModuleError(PlacementError):
    """One module would be two regions."""


class SharedModuleWarning(UserWarning):
    """Two regions share a module."""


class InactiveRegionsWarning(UserWarning):
    """Regions were applied to a model that does not train as it is."""


def apply(
    model: nn.Module,
    placement: PlacementLike | None = None,
    policy: PolicyLike | None = None,
    *,
    budget: BudgetLike | None = None,
    total: TotalLike | None = None,
    optimizer: JobLike | None = None,
    example_inputs: Any = None,
    loss_fn: Callable[[Any], torch.Tensor] | None = None,
    offload: OffloadLike | bool | None = None,
    offload_inputs: bool = False,
    shard_inputs: ShardLike | None = None,
) -> Choice:
    """Make modules of a model checkpoint regions, until :func:`remove`.

    The model is not edited: each region's module gets a ``forward`` of its own. Parameters,
    ``state_dict`` keys, hooks and classes stay as they are, and copies and pickles work.

    Args:
        model: the model.
        placement: which modules, as for :func:`as_placement`; every layer where ``None``.
        policy: what each region keeps, as for :func:`ckpt_pass.context_fn`; what the placement
            says, mostly nothing, where ``None``.
        budget: a peak to stay within, instead of a placement and a policy: an eager plan then
            chooses (``ckpt_pass.plan(..., mode="eager")``).
        total, optimizer: the memory of the whole job instead, and what steps, as for
            :func:`ckpt_pass.plan`.
        example_inputs: the model's arguments (a tuple, or one tensor), for a budget and for
            placements that measure.
        loss_fn: applied to the model's output, where that is no loss; for a budget.
        offload: where values go that the policy or the placement offloads; what the placement says
            where ``None``, mostly to the host. With a budget the plan may move values there, and
            moves none where ``None``.
        offload_inputs: also offload the activations that enter the regions.
        shard_inputs: keep a part of these on each rank of a group that holds them alike instead: a
            process group, a device mesh of one dimension, ``True`` for all ranks, or a
            :class:`ckpt_pass.Sharding`.

    Returns:
        What was chosen, as :func:`is_checkpointed` shows it.

    Raises:
        NotAModuleError: the model is none.
        AlreadyAppliedError: the model has regions already.
        PlacementError: the placement does not fit the model, or arguments contradict each other.
        SharedModuleError: one module would be two regions.
        NoLayersError: the placement needs layers, and there are none.
        InvalidOffloadError: ``offload`` is no place.
        InfeasibleBudgetError and others: see :func:`ckpt_pass.plan`.
    """
    check_module(model, "apply")
    _refuse_twice(model)
    where = as_offload(offload)
    check_offload_inputs(offload_inputs)
    asked = asked_job(total, optimizer, budget)
    if budget is None and total is None:
        if asked is not None:
            raise PlacementError(
                "Got optimizer= without total= or budget=, expected one of them: a placement does "
                "not look at the optimizer. Give total=, or leave optimizer= out."
            )
        choice = choose(model, placement, policy, example_inputs, loss_fn)
        choice = choice.with_offload(where, "inputs" if offload_inputs else None)
        choice = choice.with_shards(as_sharding(shard_inputs))
    else:
        _check_budget_alone(placement, policy, example_inputs)
        if offload_inputs or shard_inputs:
            raise PlacementError(
                "Got budget= together with offload_inputs= or shard_inputs=, expected one of them: "
                "within a budget a plan chooses. Give offload= alone, or leave budget= out."
            )
        choice = _planned(model, budget, asked, _as_args(example_inputs), loss_fn, where)
    _check_units(model, choice)
    _check_shared(model, choice)
    _warn_inactive(model, choice)
    apply_regions(model, choice.regions)
    model.__dict__[_ATTRIBUTE] = choice
    return choice


def choose(
    model: nn.Module,
    placement: PlacementLike | None,
    policy: PolicyLike | None,
    example_inputs: Any = None,
    loss_fn: Callable[[Any], torch.Tensor] | None = None,
) -> Choice:
    """What :func:`apply` would do with the same arguments; nothing is applied."""
    chosen = as_placement(DEFAULT_PLACEMENT if placement is None else placement)
    if isinstance(chosen, NeedsProfiles) and not chosen.profiles and example_inputs is not None:
        profiles = profile_layers(model, *_as_args(example_inputs), loss_fn=loss_fn)
        chosen = chosen.with_profiles(profiles)
    return chosen.choose(model).with_policy(policy)


def _as_args(example_inputs: Any) -> tuple[Any, ...]:
    return example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)


def _check_budget_alone(
    placement: PlacementLike | None, policy: PolicyLike | None, example_inputs: Any
) -> None:
    if placement is not None or policy is not None:
        raise PlacementError(
            "Got budget= or total= together with a placement or a policy, expected one of the two: "
            "within a budget a plan chooses both. Leave one of them out."
        )
    if example_inputs is None:
        raise PlacementError(
            "Got budget= or total= without example_inputs=, expected the model's arguments: a plan "
            "records one step on fake tensors."
        )


def _planned(
    model: nn.Module,
    budget: BudgetLike | None,
    asked: JobAsked | None,
    args: tuple[Any, ...],
    loss_fn: Callable[[Any], torch.Tensor] | None,
    offload: OffloadLike | None,
) -> Choice:
    def made(budget_bytes: int | None) -> Plan:
        goal = as_goal(budget if budget_bytes is None else budget_bytes, offload=offload)
        assert goal is not None
        if asked is not None and asked.job.keeps_gradients:
            goal = replace(goal, gradients="kept")
        return plan_eager(model, args, OPEN, goal, loss_fn)

    around = None if asked is None else Around.of_step(model, args, {}, loss_fn)
    plan = made(None) if asked is None or around is None else asked.planned(around, made)
    specs = plan.region_specs()
    modules = dict(model.named_modules())
    considered = dict.fromkeys([*find_layers(model).names, *specs])
    found = []
    for name in considered:
        why = f"the plan: {_words(specs[name])}" if name in specs else "the plan: kept"
        inner = sum(other.startswith(f"{name}.") for other in specs)
        if name not in specs and inner:
            why = f"the plan: {inner} modules inside"
        found.append(ModuleChoice(name, type(modules[name]).__name__, name in specs, why))
    segments = tuple(Segment((name,)) for name in specs)
    name = f"budget-{budget}" if asked is None or asked.total is None else f"total-{asked.total}"
    return Choice(name, tuple(found), segments, specs=tuple(specs.items()))


def _words(spec: RegionSpec) -> str:
    if spec.offload_saved and spec.moves is not None:
        return f"{len(spec.moves.numbers)} saved values offloaded"
    kept = sum(len(numbers) for _, numbers in _counts(spec.keeps))
    moved = ", arguments offloaded" if spec.offload_inputs else ""
    return f"recomputed, {kept} ops kept{moved}"


def _counts(keeps: Any) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return () if keeps is None else tuple(keeps.counts)


def remove(model: nn.Module) -> None:
    """Undo :func:`apply`: the model is as it was.

    Raises:
        NotAModuleError: it is no model.
        NotAppliedError: nothing is applied to it.
    """
    check_module(model, "remove")
    holders = [module for module in model.modules() if _ATTRIBUTE in module.__dict__]
    if not holders and not regions_of(model):
        raise NotAppliedError(
            f"{type(model).__name__} has no checkpoint region, so there is nothing to remove. "
            "Expected a model that a placement was applied to."
        )
    if regions_of(model):
        remove_regions(model)
    for holder in holders:
        del holder.__dict__[_ATTRIBUTE]


@contextlib.contextmanager
def applied(
    model: nn.Module,
    placement: PlacementLike | None = None,
    policy: PolicyLike | None = None,
    **options: Any,
) -> Iterator[Choice]:
    """:func:`apply` inside a ``with`` block only; gives what was chosen."""
    choice = apply(model, placement, policy, **options)
    try:
        yield choice
    finally:
        remove(model)


def is_checkpointed(model: nn.Module) -> Choice:
    """Each module that a placement considered: in or out, and why; true where any is in.

    Args:
        model: the model that a placement was applied to, or one that holds it (a training wrapper).
            Without a placement its layers are listed, and regions that a plan has made.
    """
    for prefix, module in model.named_modules():
        choice = module.__dict__.get(_ATTRIBUTE)
        if isinstance(choice, Choice):
            return choice.inside(prefix)
    regions = regions_of(model)
    modules = dict(model.named_modules())
    names = dict.fromkeys(regions or find_layers(model).names)
    why = "a plan's region, or made by hand" if regions else "no placement is applied"
    listed = tuple(
        ModuleChoice(name, type(modules[name]).__name__, name in regions, why) for name in names
    )
    return Choice("(none applied)", listed, tuple(Segment((name,)) for name in regions))


def _refuse_twice(model: nn.Module) -> None:
    applied_now = next(
        (m.__dict__[_ATTRIBUTE] for m in model.modules() if _ATTRIBUTE in m.__dict__), None
    )
    regions = regions_of(model)
    if applied_now is not None or regions:
        what = applied_now.placement if applied_now is not None else f"{len(regions)} regions"
        raise AlreadyAppliedError(
            f"{type(model).__name__} has {what} applied to it already, expected a model without "
            "regions: two placements would recompute twice. Call ckpt_pass.remove(model) first."
        )


def _check_units(model: nn.Module, choice: Choice) -> None:
    """Units of FSDP1: each puts views of what it gathers into its modules, and keeps account."""
    for name in choice.names:
        for inner in model.get_submodule(name).modules():
            if is_fsdp1(inner):
                raise PlacementError(
                    f"The region {name!r} would hold a FullyShardedDataParallel (FSDP1), which "
                    "gathers parameters only once for a forward and its recomputation. Expected "
                    "regions inside its units: apply before you wrap the model, name modules "
                    "inside (ckpt_pass.ByName(...)), or use fully_shard (FSDP2)."
                )


def _check_shared(model: nn.Module, choice: Choice) -> None:
    """One module under two names, and modules that two regions have in common."""
    modules = dict(model.named_modules(remove_duplicate=False))
    owners: dict[nn.Module, list[str]] = defaultdict(list)
    for name in choice.names:
        for inner in modules[name].modules():
            owners[inner].append(name)
    roots = {modules[name]: name for name in choice.names}
    for inner, names in owners.items():
        if len(names) < 2:
            continue
        if inner in roots:
            raise SharedModuleError(
                f"{names[0]!r} and {names[1]!r} would both be regions, but one is the other or is "
                f"inside it ({type(inner).__name__}). Expected a module to belong to one region. "
                "Name one of them: ckpt_pass.ByName(...)."
            )
        if any(True for _ in inner.parameters()) or any(True for _ in inner.buffers()):
            warnings.warn(
                f"The regions {names[0]!r} and {names[1]!r} share a {type(inner).__name__}. "
                "Gradients are right: each region runs it again for itself.",
                SharedModuleWarning,
                stacklevel=3,
            )
            return


def _warn_inactive(model: nn.Module, choice: Choice) -> None:
    if not choice:
        return
    if not any(parameter.requires_grad for parameter in model.parameters()):
        what = "no parameter that needs a gradient: regions only act where autograd records"
    elif not model.training:
        what = "been put into eval mode: regions act whenever autograd records, in training only"
    else:
        return
    warnings.warn(
        f"{type(model).__name__} has {what}. Expected a model that trains; the regions are applied "
        "nevertheless, and do nothing under torch.no_grad().",
        InactiveRegionsWarning,
        stacklevel=3,
    )
