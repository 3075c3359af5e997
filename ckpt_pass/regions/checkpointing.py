"""``ckpt_pass.checkpoint``: a checkpoint region that costs little more than its recomputation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
import torch.utils.checkpoint
from torch import nn

from ckpt_pass._errors import CkptPassError, nearest
from ckpt_pass._torch import autograd
from ckpt_pass.offloading.options import check_offload_inputs
from ckpt_pass.offloading.sharding import Sharding, ShardLike, as_sharding
from ckpt_pass.offloading.stores import OffloadLike, as_offload
from ckpt_pass.policy.named import as_policy
from ckpt_pass.policy.rules import Policy, PolicyLike
from ckpt_pass.regions.actions import actions_for
from ckpt_pass.regions.frame import RegionOptions
from ckpt_pass.regions.keeps import Keeps, Moves
from ckpt_pass.regions.running import run_region
from ckpt_pass.regions.sac import context_fn as make_context_fn
from ckpt_pass.regions.writes import known_of

DETERMINISM_CHECKS = ("default", "none")


@dataclass(frozen=True)
class RegionSpec:
    """What becomes of one region.

    Attributes:
        keeps: op executions to keep.
        policy: what to keep, where ``keeps`` is not given.
        draws: whether it may draw random numbers; ``None`` where that is not known.
        follows: the FQNs of regions whose output it may take; if it does, that is made again,
            not kept.
        nested: how a segment is made again, see :class:`ckpt_pass.regions.chain.Link`.
        offload: where values go that are offloaded; to the host where ``None``.
        offload_inputs: whether the activations among its arguments are offloaded.
        offload_saved: whether nothing is recomputed, and what autograd saves inside is offloaded.
        moves: which of these, and how they come back; all where ``None``.
        shard_inputs: over which ranks the activations among its arguments are sharded.
    """

    keeps: Keeps | None = None
    policy: PolicyLike | None = None
    draws: bool | None = None
    follows: tuple[str, ...] = ()
    nested: bool = False
    offload: OffloadLike | None = None
    offload_inputs: bool = False
    offload_saved: bool = False
    moves: Moves | None = None
    shard_inputs: Sharding | None = None


class ContradictoryRegionError(CkptPassError, ValueError):
    """More than one thing says what a region keeps."""


class ReentrantRegionError(CkptPassError, ValueError):
    """A region with reentrant autograd was asked for, which there is not."""


class DeterminismCheckError(CkptPassError, ValueError):
    """A way to check recomputed values that there is not."""


class SavedHooksError(CkptPassError, ValueError):
    """What a region keeps was asked to go through the hooks around it."""


class NoFunctionError(CkptPassError, ValueError):
    """Arguments for a function, and no function."""


class RegionPlan(Protocol):
    """What tells the region of a module by its name: a :class:`ckpt_pass.Plan`."""

    def region_spec(self, name: str) -> RegionSpec | None:
        """What becomes of a module; ``None`` where it is no region."""
        ...


def checkpoint(
    fn: Callable[..., Any] | None = None,
    *args: Any,
    policy: PolicyLike | None = None,
    plan: RegionPlan | None = None,
    name: str | None = None,
    use_reentrant: bool | None = False,
    context_fn: Callable[[], Any] | None = None,
    determinism_check: str = "default",
    debug: bool = False,
    early_stop: bool = True,
    preserve_rng_state: bool = True,
    offload: OffloadLike | bool | None = None,
    offload_inputs: bool = False,
    shard_inputs: ShardLike | None = None,
    respect_saved_tensors_hooks: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Run ``fn(*args, **kwargs)``; make what its backward needs again when the backward comes.

    As ``torch.utils.checkpoint.checkpoint(fn, *args, use_reentrant=False)``, whose keywords it
    takes, at about half of its cost on small regions: hooks on saved values, and no stash of the
    random state where nothing random was drawn. Regions nest, with torch's too. Under
    ``torch.compile`` this is torch's ``checkpoint`` with our ``context_fn``, or an eager region
    between two graphs where dynamo finds side effects; under ``torch.func`` transforms, which allow
    no hooks, under forward-mode derivatives and in ``torch.export``, ``fn`` simply runs.

    Args:
        fn: a module or function. It runs twice: it must do the same both times. Without it the
            rest is said of a function to come: ``@checkpoint(policy=...)`` decorates one.
        args, kwargs: its arguments.
        policy: what to keep nevertheless, as for :func:`ckpt_pass.context_fn`; nothing where
            ``None``.
        plan: an eager plan, which says whether the module ``name`` is a region and what it keeps.
        name: for messages and profilers; the class or function's name by default.
        use_reentrant: ``False``; there is no other way.
        context_fn: makes the contexts around forward and recomputation, instead of a policy.
        determinism_check: ``default`` compares shapes and dtypes, ``none`` nothing.
        debug: log the ops of both runs, for an error that says where they part. The region is
            then torch's own.
        early_stop: end the recomputation with the last value that the backward needs, unless so
            little comes after it that to stop would take longer.
        preserve_rng_state: draw the same random numbers in both runs.
        offload: where values go that the policy offloads; to the host where ``None`` or ``True``.
        offload_inputs: also move the activations among the arguments (tensors that have a history;
            what the region gets from elsewhere is there anyway) until the region runs again.
        shard_inputs: keep a part of each of these on each rank instead, as for :func:`apply`.
        respect_saved_tensors_hooks: torch's keyword (2.14): ``False``; what a policy keeps does not
            pass the hooks around a region, which get what autograd saves.

    Returns:
        What ``fn`` returns; a decorator without ``fn``.

    Raises:
        ReentrantRegionError, DeterminismCheckError, UnknownPolicyError, SavedHooksError,
            NoFunctionError: an argument is none.
        ContradictoryRegionError: ``policy``, ``plan`` and ``context_fn`` exclude each other, and so
            do ``offload_inputs`` and ``shard_inputs``.
        UnknownRegionError: ``plan`` knows no module of that ``name``.
        InvalidOffloadError: ``offload`` is no place.
        StoreFullError, StoreWriteError: a value cannot be offloaded.
        StoreReadError: comes in the backward.
        ShardedValueDiffersError, ShardOrderError: come in the backward, on all ranks.
        CompiledOffloadError: one of these in a graph that is traced as a whole.
        RecomputeMismatchError, MutatedArgumentError, MutatedActivationError, BackwardTwiceError:
            come in the backward.
    """
    if use_reentrant:
        refuse_reentrance(use_reentrant)
    if determinism_check not in DETERMINISM_CHECKS:
        raise DeterminismCheckError(
            f"Got determinism_check={determinism_check!r}, expected one of "
            f"{', '.join(DETERMINISM_CHECKS)}.{nearest(determinism_check, DETERMINISM_CHECKS)}"
        )
    if respect_saved_tensors_hooks:
        raise SavedHooksError(
            f"Got respect_saved_tensors_hooks={respect_saved_tensors_hooks!r}, expected False: "
            "what a policy keeps does not pass hooks around the region. To have it elsewhere, name "
            "ops MUST_CPU_OFFLOAD in the policy, and give the place as offload=."
        )
    if (policy is not None) + (plan is not None) + (context_fn is not None) > 1:
        raise _several({"policy": policy, "plan": plan, "context_fn": context_fn})
    if fn is None:
        _check_decorates(args, kwargs)
        return functools.partial(
            _decorated,
            policy=policy,
            plan=plan,
            name=name,
            context_fn=context_fn,
            determinism_check=determinism_check,
            debug=debug,
            early_stop=early_stop,
            preserve_rng_state=preserve_rng_state,
            offload=offload,
            offload_inputs=offload_inputs,
            shard_inputs=shard_inputs,
        )
    traced = torch.compiler.is_compiling()  # dynamo would guard on the table of usual options
    if autograd.debugs(debug):
        return _logged(fn, args, kwargs, policy, context_fn, preserve_rng_state)
    if plan is not None:
        spec = plan.region_spec(name or "")
        if spec is None:
            return fn(*args, **kwargs)
        options = options_for(fn, spec.policy, spec.keeps, name, preserve_rng_state)
        options = replace(
            with_moves(options, spec), draws=spec.draws if preserve_rng_state else False
        )
    elif context_fn is not None:
        draws = None if preserve_rng_state else False
        options = RegionOptions(_shown(fn, name), context_fn, context_fn, draws, root=fn)
    elif isinstance(fn, nn.Module) and name is None and preserve_rng_state and not traced:
        options = _usual_options(fn, None if policy is None else as_policy(policy))
    else:
        options = options_for(fn, policy, None, name, preserve_rng_state)
    if offload is not None or offload_inputs is not False:
        check_offload_inputs(offload_inputs)
        where = options.offload if offload is None else as_offload(offload)
        inputs = options.offload_inputs or offload_inputs
        options = replace(options, offload=where, offload_inputs=inputs)
    sharding = as_sharding(shard_inputs)
    if sharding is not None:
        options = with_shards(options, sharding)
    if not early_stop or determinism_check == "none":
        checked = determinism_check != "none"
        options = replace(options, stops_early=early_stop, checked=checked)
    return run_region(fn, args, kwargs, options)


def _check_decorates(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if args or kwargs:
        given = [type(arg).__name__ for arg in args] + list(kwargs)
        raise NoFunctionError(
            f"Got no function, and {', '.join(given)} for it. Expected a function first, or "
            "options of the region alone: checkpoint(policy=...)(fn)."
        )


def _decorated(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """A function, or method, whose every run is a region."""

    @functools.wraps(fn, updated=())  # a module's attributes are its own
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(fn, *args, **options, **kwargs)

    return run


def refuse_reentrance(use_reentrant: bool | None) -> None:
    """Raise where torch's other variant is asked for.

    Raises:
        ReentrantRegionError: it is.
    """
    if use_reentrant:
        raise ReentrantRegionError(
            "Got use_reentrant=True, expected False: regions of this library have no reentrant "
            "variant. Leave it out, or call the function of torch.utils.checkpoint."
        )


def _several(given: dict[str, object]) -> ContradictoryRegionError:
    names = [name for name, value in given.items() if value is not None]
    return ContradictoryRegionError(
        f"Got {' and '.join(names)}, expected one of them: each says what a region keeps. "
        f"Leave {names[1]} out."
    )


def _logged(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    policy: PolicyLike | None,
    contexts: Callable[[], Any] | None,
    preserve_rng_state: bool,
) -> Any:
    """A region of torch's own, which logs its ops; it takes no context_fn then."""
    chosen = make_context_fn(policy) if policy is not None else contexts
    extra: dict[str, Any] = {} if chosen is None else {"context_fn": chosen}
    return torch.utils.checkpoint.checkpoint(
        fn,
        *args,
        use_reentrant=False,
        debug=True,
        preserve_rng_state=preserve_rng_state,
        **extra,
        **kwargs,
    )


def options_for(
    fn: Callable[..., Any],
    policy: PolicyLike | None = None,
    keeps: Keeps | None = None,
    name: str | None = None,
    preserve_rng_state: bool = True,
    arguments: tuple[Any, ...] = (),
) -> RegionOptions:
    """The options of a region: which modes go around it, in eager and in a trace.

    Args:
        fn: what it runs.
        policy, keeps: what it keeps.
        name: for messages.
        preserve_rng_state: whether its recomputation draws the same random numbers.
        arguments: what it is called with, where that is known.

    Raises:
        UnknownPolicyError: ``policy`` is none.
    """
    traced: Callable[[], Any] | None = None
    asked: Policy | None = None
    chosen = keeps if keeps is not None and (keeps.counts or keeps.moved) else None
    if policy is not None or chosen is not None:
        asked = as_policy(policy) if policy is not None else cast(Policy, chosen)
        traced = make_context_fn(asked)
    draws = None if preserve_rng_state else False
    return RegionOptions(_shown(fn, name), None, traced, draws, root=fn, policy=asked)


def with_moves(options: RegionOptions, spec: RegionSpec) -> RegionOptions:
    """The options of a region with what it offloads, or shards.

    Raises:
        ContradictoryRegionError: both of its arguments.
    """
    if spec.shard_inputs is not None:
        options = with_shards(
            replace(options, offload_inputs=spec.offload_inputs), spec.shard_inputs
        )
    return replace(
        options,
        offload=spec.offload,
        offload_inputs=spec.offload_inputs,
        offload_saved=spec.offload_saved,
        moves=spec.moves,
    )


def with_shards(options: RegionOptions, sharding: Sharding) -> RegionOptions:
    """The options of a region with its arguments sharded.

    Raises:
        ContradictoryRegionError: they are offloaded.
    """
    if options.offload_inputs or options.offload_saved:
        raise ContradictoryRegionError(
            f"{options.name} has shard_inputs together with offload_inputs, or with values that "
            "are offloaded and not recomputed. Expected one of them: what enters a region is kept "
            "in one place. Leave one out."
        )
    return replace(options, shard_inputs=sharding)


def _usual_options(module: nn.Module, policy: Policy | None) -> RegionOptions:
    """Those of a module where nothing but a policy is given: made once, not for every run.

    They lie with the policy, by the module's name: what lies with the module must not lead to it.
    """
    known = known_of(module)
    if known.name is None:
        known.name = _shown(module, None)
    if policy is None:
        return _options_without_policy(known.name)
    options = actions_for(policy).options
    found: RegionOptions | None = options.get(known.name)
    if found is None:
        found = options[known.name] = _options_with(known.name, policy)
    return found


def _options_with(name: str, policy: Policy) -> RegionOptions:
    return RegionOptions(name, None, make_context_fn(policy), policy=policy)


@functools.lru_cache(maxsize=256)
def _options_without_policy(name: str) -> RegionOptions:
    # What it runs is its root, too.
    return RegionOptions(name, runs_on=True)


def _shown(fn: Callable[..., Any], name: str | None) -> str:
    return name or str(getattr(fn, "__qualname__", type(fn).__name__))
