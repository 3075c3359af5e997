"""How a region runs: in eager mode, in a graph that is traced, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch import autograd, functorch
from ckpt_pass.offloading.saved_hooks import offloaded_inside
from ckpt_pass.regions.caches import with_empty_caches
from ckpt_pass.regions.chain import Link
from ckpt_pass.regions.frame import Frame, RegionOptions
from ckpt_pass.regions.sac import contexts_of_recomputed

_TENSORS = frozenset((torch.Tensor, nn.Parameter))


class CompiledOffloadError(CkptPassError, RuntimeError):
    """A region in a traced graph is to offload what only an eager region can."""


def run_region(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: RegionOptions,
    link: Link | None = None,
) -> Any:
    """Run a function or module as a region, if it can be one here.

    Args:
        fn, args, kwargs: what runs.
        options: how.
        link: its place in a segment.

    Raises:
        CompiledOffloadError: the region moves values of its own, and is traced as a whole.
    """
    if not torch.is_grad_enabled() or _leaves_no_region():
        return fn(*args, **kwargs)
    if _in_trace():
        run = _outside_graphs if options.moves_its_own else _in_graph_or_outside
        return run(fn, args, kwargs, options, link)
    if not autograd.hooks_enabled():  # torch.autograd.graph.disable_saved_tensors_hooks
        return fn(*args, **kwargs)
    if options.offload_saved:
        root = fn if options.root is None else options.root
        chosen = () if options.moves is None else (options.moves.numbers, options.moves.ahead)
        with offloaded_inside(root, (args, kwargs), options.offload, *chosen):
            return fn(*args, **kwargs)
    if kwargs or not _TENSORS.issuperset(map(type, args)):
        root = fn if options.root is None else options.root
        run, args, kwargs = with_empty_caches(root, fn, args, kwargs)
        if run is not fn:
            fn, options = run, replace(options, root=root)
    frame = Frame(fn, options) if link is None else link.frame(fn, options)
    return frame.forward(args, kwargs)


def _in_trace() -> bool:
    """Whether ops are being written down, by dynamo or below it."""
    return torch.compiler.is_compiling() or functorch.proxy_graph() is not None


def _in_eager_mode(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: RegionOptions,
    link: Link | None,
) -> Any:
    if not _in_trace():
        return run_region(fn, args, kwargs, options, link)
    if options.moves_its_own:
        raise CompiledOffloadError(
            f"{options.name} offloads or shards its inputs, or what is saved inside, which is not "
            "supported in a graph that is traced as a whole. Leave offload_inputs and shard_inputs "
            "out, or trace the model without its regions."
        )
    return _in_graph(fn, args, kwargs, options, link)


def _in_graph(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: RegionOptions,
    link: Link | None,
) -> Any:
    """A region of torch's own, which torch's partitioner recomputes, each by itself."""
    contexts = options.traced
    if contexts is None and torch.compiler.is_compiling():
        contexts = contexts_of_recomputed
    traced: dict[str, Any] = {} if contexts is None else {"context_fn": contexts}
    return torch.utils.checkpoint.checkpoint(
        fn,
        *args,
        use_reentrant=False,
        preserve_rng_state=options.draws is not False,
        **traced,
        **kwargs,
    )


#: The same for a region that dynamo meets: it cuts the graph there, and traces nothing of it.
_outside_graphs = torch.compiler.disable(
    _in_eager_mode,
    reason="a region that offloads or shards its inputs, or what is saved, runs in eager mode",
)
#: A region that dynamo takes into its graph or, where it cannot, runs in eager mode. It cannot
#: where the region moves state that is no tensor: torch's own region would move it twice there.
_in_graph_or_outside = torch.compiler.disable(
    _in_eager_mode, reason="a region with side effects runs in eager mode"
)
torch.compiler.substitute_in_graph(_in_graph_or_outside)(_in_graph)


def _leaves_no_region() -> bool:
    """Whether what runs now is transformed, or written down, into what knows no regions.

    ``torch.func`` allows no hooks; ``torch.export`` makes a graph that has no backward; what
    forward-mode derivatives add to arguments is gone when their level ends, before the backward.
    """
    return (
        autograd.transforms_active()
        or autograd.forward_derivatives_active()
        or functorch.traces_before_autograd()
    )
