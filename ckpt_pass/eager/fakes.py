"""What the record of a step does with single values: runs on them, describes and copies them."""

from __future__ import annotations

from typing import Any

import torch


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor's elements fill its memory without overlap."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def with_known_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an op on fake tensors; grouped products in any dtype.

    Their rule for shapes knows bf16 only, while the CPU's kernel takes fp32 too (torch 2.13).
    """
    if func is not torch.ops.aten._grouped_mm.default or args[0].dtype is torch.bfloat16:
        return func(*args, **kwargs)
    halves = [value.to(torch.bfloat16) for value in args[:2]]
    return func(*halves, *args[2:], **kwargs).to(args[0].dtype)


def described(value: Any) -> object:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return type(value), value


def copied(value: torch.Tensor) -> torch.Tensor:
    """A tensor of the same look with a storage of its own."""
    return torch.empty_strided(
        tuple(value.shape), value.stride(), dtype=value.dtype, device=value.device
    )
