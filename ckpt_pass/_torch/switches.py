"""Torch's global switches that decide which kernels run, and in which precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

#: Each one's reader and writer.
_SWITCHES: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch._C._get_deterministic_algorithms, torch._C._set_deterministic_algorithms),
    (torch._C._get_float32_matmul_precision, torch._C._set_float32_matmul_precision),
    (torch._C._get_flash_sdp_enabled, torch._C._set_sdp_use_flash),
    (torch._C._get_mem_efficient_sdp_enabled, torch._C._set_sdp_use_mem_efficient),
    (torch._C._get_math_sdp_enabled, torch._C._set_sdp_use_math),
    (torch._C._get_cudnn_sdp_enabled, torch._C._set_sdp_use_cudnn),
)
_READERS = tuple(read for read, _ in _SWITCHES)


def switches_now() -> tuple[Any, ...]:
    """What they are; half a microsecond."""
    return tuple([read() for read in _READERS])


def set_switches(values: tuple[Any, ...]) -> None:
    """Set them."""
    for (read, write), value in zip(_SWITCHES, values, strict=True):
        if read() != value:
            write(value)
