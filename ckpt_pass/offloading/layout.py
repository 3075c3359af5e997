"""How a tensor lies in its storage, and tensors made alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch import storages

#: Devices whose values can be moved.
DEVICES = ("cpu", "cuda")


class UnmovableTensorError(CkptPassError, TypeError):
    """A tensor that cannot be moved: no plain values in one storage of a known device."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a tensor lies in its storage.

    Attributes:
        offset: of its first element, in elements.
        storage_bytes: of the whole storage, which is what moves.
    """

    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    storage_bytes: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Layout:
        """That of a tensor."""
        return cls(
            tensor.size(),
            tensor.stride(),
            int(tensor.storage_offset()),
            tensor.dtype,
            tensor.device,
            tensor.untyped_storage().nbytes(),
        )


#: How a tensor lies in its storage: offset, size and stride, in elements, and bytes of an element.
Part = tuple[int, torch.Size, tuple[int, ...], int]


def counted_part(tensor: torch.Tensor) -> Part | None:
    """The part of its storage whose changes a tensor's version counter tells; ``None``: all of it.

    The counter is that of the tensor and of what autograd knows as its views. The pieces that
    ``unsafe_chunk`` and ``unsafe_split`` make, in LSTMs and GRUs say, are no views to autograd:
    they lie in one storage, and each has a counter of its own.
    """
    whole = tensor if tensor._base is None else tensor._base
    offset, nbytes = int(whole.storage_offset()), whole.untyped_storage().nbytes()
    if not offset and whole.nbytes == nbytes:  # nearly always
        return None
    size, stride, itemsize = whole.size(), whole.stride(), whole.element_size()
    last = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if not offset and (last + 1) * itemsize >= nbytes:
        return None
    return offset, size, stride, itemsize


def is_movable(tensor: torch.Tensor) -> bool:
    """Whether a tensor has plain values in one storage: no subclass, not sparse, not fake."""
    kind = type(tensor)
    return (
        (kind is torch.Tensor or kind is nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.device.type in DEVICES
        and not (tensor.is_conj() or tensor.is_neg() or tensor.is_quantized)
        and not storages.is_wrapped(tensor)
    )


def check_movable(tensor: torch.Tensor) -> None:
    """Raise unless a tensor can be moved.

    Raises:
        UnmovableTensorError: it cannot.
    """
    if not is_movable(tensor):
        raise UnmovableTensorError(
            f"Got a {type(tensor).__name__} of shape {list(tensor.shape)} and layout "
            f"{tensor.layout} on {tensor.device} to be offloaded, expected a plain, strided tensor "
            f"on one of {', '.join(DEVICES)}. Keep it where it is, or offload what it is made of."
        )
