"""One number for the bytes of a tensor, the same on every rank that holds the same bytes."""

from __future__ import annotations

import zlib

import torch

#: Words that are multiplied and added at once: what is held meanwhile is small.
_BLOCK_WORDS = 1 << 14
_STEP = 0x5851F42D4C957F2D  # an odd number: every place in a block weighs otherwise


def checksum(flat: torch.Tensor) -> int:
    """The checksum of a contiguous tensor of one dimension, 0 or more and below 2**63.

    On a CPU it is a CRC, which allocates nothing of torch's; elsewhere a sum in which each place
    has a weight.
    """
    data = flat.view(torch.uint8)
    if flat.device.type == "cpu":
        return zlib.crc32(data.numpy().data)
    return weighted_sum(data)


def weighted_sum(data: torch.Tensor) -> int:
    """The checksum of bytes on any device; waits for the device once."""
    steps = torch.arange(1, _BLOCK_WORDS + 1, dtype=torch.int64, device=data.device)
    weights = steps.mul_(_STEP).bitwise_or_(1)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for block in data.split(8 * _BLOCK_WORDS):
        words = _words(block)
        total.mul_(31).add_((words * weights[: words.numel()]).sum())
    return int(total) & (2**63 - 1)


def _words(block: torch.Tensor) -> torch.Tensor:
    """Bytes as integers of eight; copied where they do not lie so."""
    missing = -block.numel() % 8
    if missing or block.data_ptr() % 8 or block.storage_offset() % 8:
        whole = torch.zeros(block.numel() + missing, dtype=torch.uint8, device=block.device)
        whole[: block.numel()].copy_(block)
        block = whole
    return block.view(torch.int64)
