"""Gradients as their leaves take them, so that nothing is allocated when the backward has run.

A leaf without a gradient keeps the tensor that the backward returns for it, if that lies in memory
as the leaf does and is returned for nothing else. Of any other, of a transposed or an expanded one,
autograd makes a copy that does (``torch/csrc/autograd/functions/accumulate_grad.h``): after the
backward, beside all of its gradients, and in no graph. Here the graph makes that copy where it
makes the gradient, so that a plan knows of it, and the other one may be let go of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeGuard

import torch
from torch import fx

from ckpt_pass._torch import functorch
from ckpt_pass.policy.sites import optimization_hint

#: Where an op of the forward is told from one of the backward, and what of a model it belongs to.
_PASSED_ON = ("nn_module_stack", "fwd_nn_module_stack", "seq_nr", "stack_trace")


def leaves_among(inputs: Iterable[Any]) -> frozenset[int]:
    """Which inputs of a graph are leaves that gradients are kept in."""
    return frozenset(
        place
        for place, value in enumerate(inputs)
        if isinstance(value, torch.Tensor) and value.requires_grad and value.is_leaf
    )


def lay_out_gradients(
    module: fx.GraphModule, num_fwd_outputs: int, leaves: Collection[int]
) -> None:
    """Let a joint graph return the gradients of leaves as they can be kept.

    Args:
        module: the graph; it is changed.
        num_fwd_outputs: how many of its outputs belong to the forward.
        leaves: which inputs of dynamo's graph are leaves of autograd's.
    """
    gradients = functorch.gradients(module, num_fwd_outputs)
    left = Counter(node for _, node, _ in gradients)
    changed = False
    for place, node, primal in gradients:
        gradient, leaf = node.meta.get("val"), primal.meta.get("val")
        if getattr(primal.meta["desc"], "idx", None) not in leaves:
            continue
        if not (_is_strided(gradient) and _is_strided(leaf) and gradient.dim() == leaf.dim()):
            continue  # of others nothing is known
        if left[node] > 1 or not _is_kept(gradient, leaf):
            left[node] -= 1
            functorch.replace_output(module, place, _copied(module.graph, node, primal))
            changed = True
    if changed:
        module.recompile()


def _is_kept(gradient: torch.Tensor, leaf: torch.Tensor) -> bool:
    """Whether a leaf keeps a gradient, as far as its layout goes."""
    size, stride = _whole(gradient.shape), _whole(gradient.stride())
    order = _order(leaf)
    wanted = _contiguous(size) if order is None else _whole(leaf.stride())
    if order is None:
        return all(n == 1 or a == b for n, a, b in zip(size, stride, wanted, strict=True))
    return all(a == b if n != 1 else a != 0 for n, a, b in zip(size, stride, wanted, strict=True))


def _is_strided(value: object) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided


def _whole(sizes: Any) -> tuple[int, ...]:
    return tuple(map(optimization_hint, sizes))


def _contiguous(size: tuple[int, ...]) -> tuple[int, ...]:
    stride, step = [], 1
    for n in reversed(size):
        stride.append(step)
        step *= max(n, 1)
    return tuple(reversed(stride))


def _order(leaf: torch.Tensor) -> tuple[int, ...] | None:
    """The dimensions of a leaf, the outermost in memory first; ``None`` if it has gaps."""
    size, stride = _whole(leaf.shape), _whole(leaf.stride())
    order = tuple(sorted(range(len(size)), key=lambda dim: (-stride[dim], size[dim] == 1)))
    dense = _contiguous(tuple(size[dim] for dim in order))
    lies = all(
        size[dim] == 1 or stride[dim] == step for dim, step in zip(order, dense, strict=True)
    )
    return order if lies else None


def _copied(graph: fx.Graph, gradient: fx.Node, leaf: fx.Node) -> fx.Node:
    """A node for the same gradient in memory of its own that lies as the leaf's does."""
    order = _order(leaf.meta["val"])
    turned = order is not None and order != tuple(range(len(order)))
    # After all inputs, where the gradient is one.
    last = graph.find_nodes(op="placeholder")[-1] if gradient.op == "placeholder" else gradient
    with graph.inserting_after(last):
        found = gradient
        if order is not None and turned:
            found = _call(graph, gradient, torch.ops.aten.permute.default, (found, list(order)))
    with graph.inserting_after(last if found is gradient else found):
        how = {"memory_format": torch.contiguous_format}
        found = _call(graph, gradient, torch.ops.aten.clone.default, (found,), how)
    if order is not None and turned:
        back = sorted(range(len(order)), key=order.__getitem__)
        with graph.inserting_after(found):
            found = _call(graph, gradient, torch.ops.aten.permute.default, (found, back))
    return found


def _call(
    graph: fx.Graph,
    gradient: fx.Node,
    target: Callable[..., torch.Tensor],
    args: tuple[fx.Node, *tuple[Any, ...]],
    kwargs: dict[str, Any] | None = None,
) -> fx.Node:
    named = kwargs or {}
    found = graph.call_function(target, args, named)
    found.meta.update({key: gradient.meta[key] for key in _PASSED_ON if key in gradient.meta})
    found.meta["partitioner_tag"] = "is_backward"
    given = args[0].meta["val"]
    found.meta["val"] = functorch.fake_like(lambda: target(given, *args[1:], **named), given)
    return found
