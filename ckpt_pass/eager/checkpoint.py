"""``ckpt_pass.checkpoint``: a checkpoint region that costs little more than its recomputation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ckpt_pass import _torch, _torch_autograd
from ckpt_pass.eager.chain import Link
from ckpt_pass.eager.frame import Contexts, Frame, RegionOptions
from ckpt_pass.eager.keeps import Keeps, rerun_context
from ckpt_pass.eager.sac import context_fn, selective_contexts
from ckpt_pass.policies import as_policy
from ckpt_pass.policy import Policy, PolicyLike


def checkpoint(
    fn: Callable[..., Any],
    *args: Any,
    policy: PolicyLike | None = None,
    keeps: Keeps | None = None,
    name: str | None = None,
    preserve_rng_state: bool = True,
    **kwargs: Any,
) -> Any:
    """Run ``fn(*args, **kwargs)``; make what its backward needs again when the backward comes.

    As ``torch.utils.checkpoint.checkpoint(fn, *args, use_reentrant=False)``, at about half of its
    cost on small regions: hooks on saved values, without a stash of the random state where nothing
    random was drawn, and with shapes alone compared. Regions nest, with torch's too. Under
    ``torch.compile`` this is torch's ``checkpoint`` with our ``context_fn``; under ``torch.func``
    transforms, which allow no hooks, ``fn`` simply runs.

    Args:
        fn: a module or function. It runs twice: it must do the same both times.
        args, kwargs: its arguments.
        policy: what to keep nevertheless, as for :func:`ckpt_pass.context_fn`; nothing where
            ``None``.
        keeps: which executions of which ops to keep, instead of a policy (a plan says so).
        name: for messages and profilers; the class or function's name by default.
        preserve_rng_state: draw the same random numbers in both runs.

    Returns:
        What ``fn`` returns.

    Raises:
        UnknownPolicyError: ``policy`` is none.
        RecomputeMismatchError, MutatedArgumentError, MutatedActivationError, BackwardTwiceError:
            come in the backward.
    """
    options = options_for(fn, policy, keeps, name, preserve_rng_state)
    return run_region(fn, args, kwargs, options)


def run_region(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: RegionOptions,
    link: Link | None = None,
) -> Any:
    """The same, with options that were made before; ``link`` is its place in a segment."""
    if not torch.is_grad_enabled() or _torch_autograd.transforms_active():
        return fn(*args, **kwargs)
    if torch.compiler.is_compiling() or _torch.proxy_graph() is not None:
        traced: dict[str, Any] = {} if options.traced is None else {"context_fn": options.traced}
        return torch.utils.checkpoint.checkpoint(
            fn,
            *args,
            use_reentrant=False,
            preserve_rng_state=options.draws is not False,
            **traced,
            **kwargs,
        )
    frame = Frame(fn, options) if link is None else link.frame(fn, options)
    return frame.forward(args, kwargs)


def options_for(
    fn: Callable[..., Any],
    policy: PolicyLike | None = None,
    keeps: Keeps | None = None,
    name: str | None = None,
    preserve_rng_state: bool = True,
) -> RegionOptions:
    """The options of a region: which modes go around it, in eager and in a trace.

    Raises:
        UnknownPolicyError: ``policy`` is none.
    """
    traced: Callable[[], Any] | None = None
    eager: Callable[[], Contexts] | None = None
    chosen = keeps if keeps is not None and keeps.counts else None
    if policy is not None or chosen is not None:
        asked: Policy = as_policy(policy) if policy is not None else cast(Policy, chosen)
        traced = context_fn(asked)
        eager = functools.partial(selective_contexts, asked, owner=_owner_of_buffers(fn))
    elif (owner := _owner_of_buffers(fn)) is not None:
        eager = functools.partial(rerun_context, owner)
    draws = None if preserve_rng_state else False
    shown = name or str(getattr(fn, "__qualname__", type(fn).__name__))
    return RegionOptions(shown, eager, traced, draws)


def _owner_of_buffers(fn: Callable[..., Any]) -> nn.Module | None:
    """The module that a region is (or is a method of), if it updates running statistics."""
    owner = fn if isinstance(fn, nn.Module) else getattr(fn, "__self__", None)
    if not isinstance(owner, nn.Module):
        return None
    norms = (module for module in owner.modules() if isinstance(module, _NormBase))
    return owner if any(norm.track_running_stats for norm in norms) else None
