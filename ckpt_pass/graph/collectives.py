"""What collectives of ranks allocate besides their outputs, which nobody can measure alone.

Seen in allocation events (gloo, CPU, torch 2.13, two ranks): a gather and a reduce-scatter copy the
larger of their two sides into one buffer; all-reduces, broadcasts and copies into buckets allocate
nothing. gloo's thread lets go of the buffer when it gets to it, some microseconds later. Buffers of
NCCL are not of torch's allocator.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from ckpt_pass.ops.taxonomy import op_name
from ckpt_pass.policy.sites import output_tensors

_GATHERS = ("gather", "reduce_scatter")
_SPACES = ("c10d.", "_c10d_functional.", "_c10d_functional_autograd.")
#: FSDP2's copy of gradients into the buffer that ranks share out; the second from torch 2.15 on.
_CHUNK_CATS = ("fsdp.chunk_cat.default", "fsdp.chunk_cat_mixed_dtype.default")


def collective_workspace_bytes(node: fx.Node) -> int:
    """Bytes that a collective allocates and frees besides its outputs; 0 for all other ops."""
    name = op_name(node.target) if callable(node.target) else ""
    if name in _CHUNK_CATS:
        return _padded_bytes(node)
    if not name.startswith(_SPACES) or not any(kind in name for kind in _GATHERS):
        return 0
    given = (one.meta.get("val") for one in node.all_input_nodes)
    inputs = [tensor for value in given for tensor in output_tensors(value)]
    if not inputs or not _by_gloo(inputs[0].device):
        return 0
    outputs = list(output_tensors(node.meta.get("val")))
    return max(_bytes(inputs), _bytes(outputs))


def _padded_bytes(node: fx.Node) -> int:
    """What copying gradients into the buffer of a reduce-scatter takes besides.

    Rows that ranks cannot share out evenly are copied with padding. Gradients of one dtype are cast
    to the buffer's one at a time, as they are padded; of several, all whose dtype is not the
    buffer's are cast first (torch 2.15).
    """
    given = inspect.signature(_chunk_cat).bind(*node.args, **node.kwargs).arguments
    values = [one.meta["val"] for one in given["tensors"]]
    ranks, whole = given["num_chunks"], given["out"].meta["val"]
    first = len({value.dtype for value in values}) > 1
    sizes = [
        _shared_out(value, ranks) * (whole.itemsize if first else value.itemsize)
        for value in values
    ]
    uneven = (_shared_out(value, ranks) > value.numel() for value in values)
    padded = sum(itertools.compress(sizes, uneven))
    others = [value.dtype != whole.dtype for value in values]
    if first:
        cast = sum(v.numel() for v in itertools.compress(values, others)) * whole.itemsize
        return int(padded + cast)
    return int(padded + max(itertools.compress(sizes, others), default=0))


def _shared_out(value: torch.Tensor, ranks: int) -> int:
    """The numbers in a gradient whose rows are filled up to as many for each rank."""
    rows = value.shape[0]
    return int(value.numel() // rows * -(-rows // ranks) * ranks) if rows else 0


def _chunk_cat(tensors: Any, dim: int, num_chunks: int, *, out: Any) -> None:
    """How the operator is called."""


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return max((tensor.numel() * tensor.element_size() for tensor in tensors), default=0)


def _by_gloo(device: torch.device) -> bool:
    """Whether gloo exchanges a device's tensors."""
    if device.type != "cpu" or not (dist.is_available() and dist.is_initialized()):
        return False
    return "gloo" in dist.get_backend(dist.group.WORLD)
