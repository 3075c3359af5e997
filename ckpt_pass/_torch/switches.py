"""Torch's switches that decide which kernels run, and in which precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

_DENORMAL = 1e-310


# Readers and writers of C alone: all are called in every run of a region.


def _set_deterministic(value: bool) -> None:
    warns = torch._C._get_deterministic_algorithms_warn_only()
    torch._C._set_deterministic_algorithms(value, warn_only=warns)


def _set_warns_only(value: bool) -> None:
    torch._C._set_deterministic_algorithms(
        torch._C._get_deterministic_algorithms(), warn_only=value
    )


def _set_denormal(value: bool) -> None:
    torch.set_flush_denormal(not value)


#: Each one's reader and writer.
_SWITCHES: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch._C._get_deterministic_algorithms, _set_deterministic),
    (torch._C._get_deterministic_algorithms_warn_only, _set_warns_only),
    # True of a denormal number, unless this thread's processor takes these for zero; torch cannot
    # be asked.
    (_DENORMAL.__bool__, _set_denormal),
    (torch._C._get_float32_matmul_precision, torch._C._set_float32_matmul_precision),
    (torch._C._get_flash_sdp_enabled, torch._C._set_sdp_use_flash),
    (torch._C._get_mem_efficient_sdp_enabled, torch._C._set_sdp_use_mem_efficient),
    (torch._C._get_math_sdp_enabled, torch._C._set_sdp_use_math),
    (torch._C._get_cudnn_sdp_enabled, torch._C._set_sdp_use_cudnn),
    (torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
    (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
)
_OF_CUDA: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled),
    (torch._C._get_cudnn_benchmark, torch._C._set_cudnn_benchmark),
    (torch._C._get_cudnn_deterministic, torch._C._set_cudnn_deterministic),
    (torch._C._get_cudnn_allow_tf32, torch._C._set_cudnn_allow_tf32),
)
if torch.backends.cuda.is_built():
    _SWITCHES += _OF_CUDA
#: Whether autocast is on for the CPU or another type of device, whose name need not be read.
any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled


def autocast_caches() -> bool:
    """Whether autocast runs an op now and keeps the casts of weights that it makes for that.

    Asked from below it, where it is switched off: then only how deep its contexts are tells.
    """
    if any_autocast() or not torch.is_autocast_cache_enabled():
        return False
    depth = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return depth > 1


#: What tells what they are: half a microsecond for all.
READERS = tuple(read for read, _ in _SWITCHES)


def switches_now() -> list[Any]:
    """What they are."""
    return [read() for read in READERS]


def set_switches(values: Sequence[Any]) -> None:
    """Set them."""
    for (read, write), value in zip(_SWITCHES, values, strict=True):
        if read() != value:
            write(value)
