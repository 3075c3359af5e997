"""Which parameters a step gives gradients: its forward on fake tensors, and the graph behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ckpt_pass._torch import ahead
from ckpt_pass.graph.link import device_of
from ckpt_pass.state.holders import Reached
from ckpt_pass.state.untouched import untouched


def without_gradient(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    loss_fn: Callable[..., Any] | None = None,
) -> frozenset[int]:
    """The ids of the parameters that ``loss_fn(model(*args, **kwargs))`` does not depend on.

    Empty where that is not known: the forward looks at values, a function of the user's own (a
    reentrant checkpoint, say) hides what it runs, or autograd has no such device here.
    """
    roots = model, loss_fn, args, dict(kwargs)
    tensors = Reached(roots).tensors
    fakes = ahead.Fakes(tensors)
    device = device_of(map(fakes, tensors))
    if device.type == "cuda" and not torch.cuda.is_available():
        return frozenset()  # autograd would ask it for its stream, and end the process
    names = {id(p): p for p in tensors if isinstance(p, nn.Parameter) and p.requires_grad}
    stand_ins: dict[int, int] = {}

    def stand_in(tensor: torch.Tensor) -> torch.Tensor:
        found = fakes(tensor)
        stand_ins[id(found)] = id(tensor)
        return found

    reached: set[int] | None = None
    told = contextlib.suppress(Exception)  # whatever it raises, planning the step will tell
    quiet = ahead.without_log()
    with quiet, told, untouched(*roots, stand_in=stand_in) as (_, _, given, named), fakes.mode:
        output = model(*given, **named)
        reached = _leaves_behind(output if loss_fn is None else loss_fn(output))
    if not reached:
        return frozenset()
    used = {stand_ins.get(leaf) for leaf in reached}
    return frozenset(names.keys() - used)


def _leaves_behind(output: Any) -> set[int] | None:
    """The ids of the leaves that tensors depend on; ``None`` where a node may hide some."""
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    found = {id(tensor) for tensor in tensors if tensor.is_leaf and tensor.requires_grad}
    pending = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return None
        variable = getattr(node, "variable", None)  # of a leaf
        if isinstance(variable, torch.Tensor):
            found.add(id(variable))
        following = set(_next(node)) - seen
        pending += following
        seen |= following
    return found


def _next(node: Any) -> Iterator[Any]:
    return (child for child, _ in node.next_functions if child is not None)
