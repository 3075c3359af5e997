"""Functions that take another way on fake tensors than on real ones."""

from __future__ import annotations

import math
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
        if func in (torch.nn.functional.ctc_loss, torch.ctc_loss):
            return _ctc_loss(func, *args, **kwargs)
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


def _ctc_loss(
    func: Callable[..., Any],
    log_probs: torch.Tensor,
    targets: torch.Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: int | str = "mean",
    zero_infinity: bool = False,
) -> torch.Tensor:
    """``at::ctc_loss``: it writes lengths that are numbers into memory, of which fakes have none.

    With lengths in tensors, and where cuDNN may compute it, it goes on as it is.
    """
    numbers, counts = _numbers(input_lengths), _numbers(target_lengths)
    goes_on = not autograd.is_fake(log_probs) or log_probs.device.type == "cuda"
    found: torch.Tensor
    if goes_on or numbers is None or counts is None:
        given = input_lengths, target_lengths, blank, reduction, zero_infinity
        found = func(log_probs, targets, *given)
        return found
    rows = log_probs if log_probs.dim() == 3 else log_probs.unsqueeze(1)
    indices = targets.to(rows.device, torch.long)
    losses: torch.Tensor = torch._ctc_loss(rows, indices, numbers, counts, blank, zero_infinity)[0]
    if zero_infinity:
        zero = torch.zeros((), dtype=losses.dtype, device=losses.device)
        losses = torch.where(losses == math.inf, zero, losses)
    if reduction in (1, "mean"):
        lengths = torch.tensor(counts, dtype=losses.dtype, device=losses.device)
        return (losses / lengths.clamp_min(1)).mean()
    if reduction in (2, "sum"):
        return losses.sum()
    return losses if log_probs.dim() == 3 else losses.squeeze(0)


def _numbers(lengths: Any) -> list[int] | None:
    """Lengths in a tuple or a list; ``None`` for those in a tensor."""
    return None if isinstance(lengths, torch.Tensor) else [*map(int, lengths)]
