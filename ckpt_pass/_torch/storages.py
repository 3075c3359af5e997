"""Tensors as bytes, and bytes as tensors; no mode of dispatch sees any of it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import (
    _disable_current_modes,
    is_traceable_wrapper_subclass,
)

#: Tells whether a storage is still there, and keeps its address from being used again meanwhile.
WeakStorage = StorageWeakRef


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a transform of ``torch.func`` has wrapped a tensor: its own storage is empty."""
    return bool(is_functorch_wrapped_tensor(tensor))


def shared_alias(tensor: torch.Tensor) -> torch.Tensor:
    """An alias without autograd history that shares the version counter.

    So is a view that is made below autograd: torch's selective checkpointing does the same around
    its ``detach`` (``_detach_helper``), with a context. This comes for each output that a region
    saves, and makes none.
    """
    was_left_out = _IS_EXCLUDED(_VIEWS)
    _SET_EXCLUDED(_VIEWS, False)
    try:
        return tensor.detach()
    finally:
        _SET_EXCLUDED(_VIEWS, was_left_out)


_IS_EXCLUDED: Callable[[Any], bool] = torch._C._dispatch_tls_is_dispatch_key_excluded
_SET_EXCLUDED: Callable[[Any, bool], None] = torch._C._dispatch_tls_set_dispatch_key_excluded
_VIEWS = torch._C.DispatchKey.ADInplaceOrView


def detached(tensor: torch.Tensor) -> torch.Tensor:
    """The same, whatever modes dispatch now: none sees it."""
    if not torch._C._len_torch_dispatch_stack():
        return shared_alias(tensor)
    if is_traceable_wrapper_subclass(tensor):  # a DTensor, whose class makes the alias
        with _disable_current_modes():
            return shared_alias(tensor)
    with torch._C._DisableTorchDispatch():
        return shared_alias(tensor)


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether there are values to read: FSDP gives back the memory of tensors that stay."""
    if not tensor.numel() or is_traceable_wrapper_subclass(tensor):
        return True
    return tensor.layout is not torch.strided or tensor.untyped_storage().nbytes() > 0


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place; -1 where nobody counts (inference tensors)."""
    return -1 if tensor.is_inference() else tensor._version


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The whole storage of a tensor, as a tensor of bytes."""
    with torch._C._DisableTorchDispatch():
        return _bytes_over(tensor.untyped_storage(), tensor.device)


def pinned_bytes(nbytes: int) -> torch.Tensor:
    """Pinned bytes of the host, with no values yet."""
    with torch._C._DisableTorchDispatch():
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)


def part_of(data: torch.Tensor, offset: int, nbytes: int) -> torch.Tensor:
    """Some of the bytes."""
    with torch._C._DisableTorchDispatch():
        return data.narrow(0, offset, nbytes)


def begin_copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy bytes on the current stream; nobody waits."""
    with torch._C._DisableTorchDispatch(), torch.no_grad():
        target.copy_(source, non_blocking=True)


def bytes_again(weak: WeakStorage) -> torch.Tensor | None:
    """The storage as a tensor of bytes, if it is there still."""
    storage = torch.UntypedStorage._new_with_weak_ptr(weak.cdata)
    if storage is None:
        return None
    with torch._C._DisableTorchDispatch():
        return _bytes_over(storage, storage.device)


def new_bytes(nbytes: int, device: torch.device) -> torch.Tensor:
    """Bytes with no values yet."""
    with torch._C._DisableTorchDispatch():
        return torch.empty(nbytes, dtype=torch.uint8, device=device)


def viewed(
    data: torch.Tensor, dtype: torch.dtype, offset: int, size: torch.Size, stride: tuple[int, ...]
) -> torch.Tensor:
    """The storage of bytes, looked at as a tensor like that; without history."""
    with torch._C._DisableTorchDispatch(), torch.no_grad():
        made = torch.empty(0, dtype=dtype, device=data.device)
        return made.set_(data.untyped_storage(), offset, size, stride)


@contextlib.contextmanager
def told_of_resizes(told: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Inside, be told of each storage whose size this thread's Python has set.

    FSDP takes the memory of gathered parameters, and gives it back, so. No mode sees it.
    """
    kind, thread = torch.UntypedStorage, threading.get_ident()
    own = vars(kind).get("resize_")
    resize: Callable[[torch.UntypedStorage, int], Any] = kind.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        found = resize(storage, size)
        if threading.get_ident() == thread:
            told(storage)
        return found

    kind.resize_ = resize_  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        if own is None:
            del kind.resize_
        else:
            kind.resize_ = own  # type: ignore[method-assign]


def _bytes_over(storage: torch.UntypedStorage, device: torch.device) -> torch.Tensor:
    with torch.no_grad():
        made = torch.empty(0, dtype=torch.uint8, device=device)
        return made.set_(storage, 0, (storage.nbytes(),), (1,))
