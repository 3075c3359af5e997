"""DistributedDataParallel while a step is recorded: what it holds, without the other ranks.

Its reducer is C++ that counts real gradients, and exchanges them. In a record a replica runs alone:
its buckets were there before the step, gradients that are views of them are copied there as they
come, and let go. What it does to buffers before the forward is over when memory begins to fill.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ckpt_pass._errors import CkptPassError
from ckpt_pass.job.buckets import are_gradients, in_buckets, replicas_in


class ReplicaError(CkptPassError):
    """A DistributedDataParallel of a kind whose memory is not known."""


@contextlib.contextmanager
def replicas_alone(model: nn.Module) -> Iterator[None]:
    """Inside, each DDP module of a model whose parameters are fake runs alone.

    Raises:
        ReplicaError: one casts parameters, or exchanges gradients after the backward.
    """
    replicas = replicas_in(model)
    for replica in replicas:
        _check(model, replica)
    handles = [handle for replica in replicas for handle in _buckets(replica)]
    for replica in replicas:
        replica.forward = _alone(replica)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for replica in replicas:
            del replica.forward


def _check(model: nn.Module, replica: Any) -> None:
    what = ""
    if replica.mixed_precision is not None:
        what = "mixed_precision"
    elif replica._delay_all_reduce_all_params:
        what = "delay_all_reduce_named_params"
    if what:
        raise ReplicaError(
            f"A DistributedDataParallel in {type(model).__name__} has {what}, expected none: what "
            "it holds then is not in the peak of a plan. Plan its module, and leave room for it in "
            "the budget, or use fully_shard with a MixedPrecisionPolicy."
        )


def _alone(replica: Any) -> Callable[..., Any]:
    """The forward of the module inside; its outputs are copied where DDP copies them."""
    copies = bool(replica.find_unused_parameters) != bool(replica.static_graph)

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = replica.module(*args, **kwargs)
        return tree_map_only(torch.Tensor, torch.clone, output) if copies else output

    return forward


def _buckets(replica: Any) -> Iterator[Any]:
    """Copy each gradient to its bucket as it comes, where gradients are views of buckets."""
    if not are_gradients(replica):
        return
    for parameter in in_buckets(replica):
        bucket = torch.empty_like(parameter, requires_grad=False)
        yield parameter.register_post_accumulate_grad_hook(_to_bucket(bucket))


def _to_bucket(bucket: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def copy(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        if parameter.grad is not bucket:
            bucket.copy_(parameter.grad)
            parameter.grad = bucket

    return copy
