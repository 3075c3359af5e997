"""Buckets of DistributedDataParallel: there before a step, beside the gradients or as them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def replicas_in(model: nn.Module) -> list[DistributedDataParallel]:
    """A model's modules that exchange gradients through buckets."""
    return [module for module in model.modules() if isinstance(module, DistributedDataParallel)]


def in_buckets(replica: Any) -> Iterator[torch.Tensor]:
    """The parameters of which a replica has the gradients in buckets."""
    ignored = replica.parameters_to_ignore
    for name, parameter in replica.module.named_parameters():
        if parameter.requires_grad and name not in ignored:
            yield parameter


def are_gradients(replica: Any) -> bool:
    """Whether gradients are views of a replica's buckets, as they are exchanged."""
    return bool(replica.gradient_as_bucket_view and replica.require_backward_grad_sync)


def buckets_of(model: nn.Module) -> tuple[tuple[torch.Tensor, bool], ...]:
    """Each parameter that has a place in a bucket, and whether its gradient is that."""
    return tuple(
        (parameter, are_gradients(replica))
        for replica in replicas_in(model)
        for parameter in in_buckets(replica)
    )
