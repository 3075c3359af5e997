"""Functions that take another way on fake tensors than on real ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ckpt_pass._torch import autograd


class RealPaths(TorchFunctionMode):
    """Lets fake tensors go the way of real ones, where torch tells the two apart.

    Args:
        asks: whether values that only checks look at are to be asked for, as a real step does.
    """

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self._asks = asks

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.one_hot:
            return self._one_hot(*args, **kwargs)
        if func is torch.Tensor.__format__ and autograd.is_fake(args[0]) and not args[0].ndim:
            return format(args[0].item(), *args[1:])
        return func(*args, **kwargs)

    def _one_hot(self, tensor: torch.Tensor, num_classes: int = -1) -> torch.Tensor:
        """``at::one_hot``: of fake tensors it compares with all classes, which takes more."""
        if not autograd.is_fake(tensor) or not tensor.numel():
            return torch.nn.functional.one_hot(tensor, num_classes)
        if self._asks and tensor.device.type == "cpu":
            tensor.min().item()
        if num_classes == -1 or (self._asks and tensor.device.type == "cpu"):
            largest = int(tensor.max().item())
            num_classes = largest + 1 if num_classes == -1 else num_classes
        found = torch.zeros(*tensor.shape, num_classes, dtype=tensor.dtype, device=tensor.device)
        return found.scatter_(-1, tensor.unsqueeze(-1), 1)
