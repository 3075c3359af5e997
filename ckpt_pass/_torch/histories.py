"""How a tensor was made: whether it is known, whether a backward comes by, and how to let it go."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NoReturn, cast

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ckpt_pass._torch.autograd import is_gathered


def has_history(value: torch.Tensor) -> bool:
    """Whether ops made a tensor."""
    try:
        return not value.is_leaf
    except RuntimeError:  # a view whose base was changed in a way that takes its history away
        return True


class Follower:
    """A hook that tells an object, held weakly, that a backward has come by (``follow()``)."""

    def __init__(self, told: Any) -> None:
        self._told = weakref.ref(told)

    def __call__(self, grad: Any) -> None:
        told = self._told()
        if told is not None:
            told.follow()

    def on(self, tensor: torch.Tensor) -> list[Any]:
        """Be called when a backward comes to a tensor, to end there or to go on through its op.

        Returns:
            What ends that: their ``remove()``.
        """
        assert tensor.grad_fn is not None
        with torch._C.DisableTorchFunction():
            # An op of several outputs is come to by way of the others, too.
            return [tensor.register_hook(self), tensor.grad_fn.register_prehook(self)]


def may_be_cut(tensor: torch.Tensor) -> bool:
    """Whether :func:`cut_history` works on a tensor that ops made, and no user looks at it."""
    if type(tensor) is not torch.Tensor or tensor.is_nested or is_gathered(tensor):
        return False
    # Who looks for it later may differentiate it; and what looks at nothing else holds it so.
    if weakref.getweakrefcount(tensor):
        return False
    hooks = tensor._backward_hooks
    # A copy: other threads put theirs on a tensor that several read.
    if hooks and not all(isinstance(hook, Follower) for hook in tuple(hooks.values())):
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    try:
        return not (tensor.is_leaf or tensor.retains_grad)
    except RuntimeError:  # as in :func:`has_history`
        return False


class _LetGo(torch.autograd.Function):
    """The same memory, of which it is not known any more how it was made."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> NoReturn:
        raise RuntimeError(
            "A backward in the recomputation of a checkpoint region goes through the history of a "
            "tensor that the region found on an attribute. Its forward did not, so that it was let "
            "go. Pass the tensor to the region as an argument."
        )


class _OverOtherMemory(torch.autograd.Function):
    """What a tensor is, in other memory that holds the same values."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        return make()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def over_other_memory(tensor: torch.Tensor, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """A tensor that comes of all that a tensor comes of, and looks at memory of its own.

    Args:
        tensor: one that ops made.
        make: makes one without a history, whose values are the same.
    """
    with torch._C.DisableTorchFunction(), torch.enable_grad():
        return cast(torch.Tensor, _OverOtherMemory.apply(tensor, make))  # type: ignore[no-untyped-call]


def cut_history(tensor: torch.Tensor) -> bool:
    """Let a tensor of the same memory and version, that comes of no other, be behind an object.

    As ``torch.utils.swap_tensors`` does, which asks that nothing else refers to the tensor: here
    the graphs that do keep what they refer to.

    Returns:
        Whether it was done; not where C++ code refers to the tensor weakly.
    """
    if not may_be_cut(tensor):
        return False
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.enable_grad():
        other = cast(torch.Tensor, _LetGo.apply(tensor.detach().requires_grad_()))  # type: ignore[no-untyped-call]
        if tensor._is_view():
            other = torch.ops.aten.alias.default(other)
        try:
            torch._C._swap_tensor_impl(tensor, other)
        except RuntimeError:
            return False
    # Hooks that are put there from now on are the new one's.
    tensor._backward_hooks = None
    return True
