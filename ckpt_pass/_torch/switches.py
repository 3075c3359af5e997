"""Torch's switches that decide which kernels run, and in which precision."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

_SMALLEST_NORMAL = sys.float_info.min


def _flushes_denormals() -> bool:
    """Whether this thread's processor takes denormal numbers for zero; torch cannot be asked."""
    return _SMALLEST_NORMAL * 0.5 == 0.0


def _determinism() -> tuple[bool, bool]:
    return (
        torch._C._get_deterministic_algorithms(),
        torch._C._get_deterministic_algorithms_warn_only(),
    )


def _set_determinism(values: tuple[bool, bool]) -> None:
    torch._C._set_deterministic_algorithms(values[0], warn_only=values[1])


#: Each one's reader and writer.
_SWITCHES: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (_determinism, _set_determinism),
    (_flushes_denormals, torch.set_flush_denormal),
    (torch._C._get_float32_matmul_precision, torch._C._set_float32_matmul_precision),
    (torch._C._get_flash_sdp_enabled, torch._C._set_sdp_use_flash),
    (torch._C._get_mem_efficient_sdp_enabled, torch._C._set_sdp_use_mem_efficient),
    (torch._C._get_math_sdp_enabled, torch._C._set_sdp_use_math),
    (torch._C._get_cudnn_sdp_enabled, torch._C._set_sdp_use_cudnn),
    (torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
)
_OF_CUDA: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled),
    (torch._C._get_cudnn_benchmark, torch._C._set_cudnn_benchmark),
    (torch._C._get_cudnn_deterministic, torch._C._set_cudnn_deterministic),
    (torch._C._get_cudnn_allow_tf32, torch._C._set_cudnn_allow_tf32),
)
if torch.backends.cuda.is_built():
    _SWITCHES += _OF_CUDA
_READERS = tuple(read for read, _ in _SWITCHES)


def switches_now() -> tuple[Any, ...]:
    """What they are; a microsecond."""
    return tuple([read() for read in _READERS])


def set_switches(values: tuple[Any, ...]) -> None:
    """Set them."""
    for (read, write), value in zip(_SWITCHES, values, strict=True):
        if read() != value:
            write(value)
