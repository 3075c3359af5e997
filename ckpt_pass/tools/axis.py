"""The dimension of a step's arguments that varies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from ckpt_pass._errors import CkptPassError, nearest

#: ``"batch"``, ``"sequence"``, or for each argument's index or name the dimension that varies.
DimLike: TypeAlias = str | Mapping[int | str, int]

#: Names of dimensions, and where tensors have them.
DIMENSIONS = {"batch": 0, "sequence": 1}
#: Names of dimensions that a command line offers.
NAMES = tuple(DIMENSIONS)


class UnknownDimensionError(CkptPassError):
    """A dimension that the arguments do not have, or that the step's memory does not depend on."""


@dataclass(frozen=True)
class Axis:
    """The dimension that varies.

    Attributes:
        name: in words.
        dims: the dimension of each argument that has it, by the argument's index or name.
        size: what it is in the given arguments.
        args: these, by index or name.
    """

    name: str
    dims: tuple[tuple[int | str, int], ...]
    size: int
    args: Mapping[int | str, Any]

    @classmethod
    def of(cls, args: Mapping[int | str, Any], dim: DimLike) -> Axis:
        """Find a dimension in the arguments.

        Raises:
            UnknownDimensionError: they do not have it.
        """
        name = dim if isinstance(dim, str) else "given"
        dims = _named(args, dim) if isinstance(dim, str) else tuple(dim.items())
        for index, place in dims:
            known = isinstance(args.get(index), torch.Tensor)
            if not known or not 0 <= place < args[index].dim():
                raise UnknownDimensionError(
                    f"There is no argument {index} with a dimension {place}: the arguments are "
                    f"{_shapes(args)}. Expected {{argument index: dimension}} of tensors."
                )
        sizes = {args[index].shape[place] for index, place in dims}
        if len(sizes) != 1:
            raise UnknownDimensionError(
                f"Got dim={dim!r}, of the sizes {sorted(sizes)}: the arguments are "
                f"{_shapes(args)}. Expected dimensions of one size, which are to stay equal."
            )
        return cls(name, dims, int(sizes.pop()), args)

    @property
    def places(self) -> tuple[str, ...]:
        """As :class:`ckpt_pass.shapes.Dimension` calls them."""
        return tuple(f"argument {index} dim {place}" for index, place in self.dims)

    def bytes_at(self, size: int) -> int:
        """Bytes of the arguments that have the dimension, at another size."""
        return sum(self.args[index].nbytes // self.size * size for index, _ in self.dims)

    def distinct_size(self) -> int:
        """A size of 2 or more that no other dimension has: torch gives equal sizes one symbol."""
        others = {
            size
            for index, arg in self.args.items()
            if isinstance(arg, torch.Tensor)
            for place, size in enumerate(arg.shape)
            if (index, place) not in self.dims
        }
        found = max(self.size, 2)
        while found in others:
            found += 1
        return found

    def resized(self, size: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with another size; their contents are not looked at, and not set."""
        found = dict(self.args)
        for index, place in self.dims:
            old = found[index]
            shape = [*old.shape[:place], size, *old.shape[place + 1 :]]
            order = sorted(range(old.dim()), key=lambda d: -old.stride(d))
            new = torch.empty_permuted(shape, order, dtype=old.dtype, device=old.device)
            found[index] = new.requires_grad_(old.requires_grad)
        return _apart(found)

    def repeated(self, size: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with another size: as many of their own samples, from the first on again.

        For a model that reads them.
        """
        found = dict(self.args)
        for index, place in self.dims:
            old = found[index]
            numbers = torch.arange(size, device=old.device) % self.size
            found[index] = old.detach().index_select(place, numbers)
            found[index].requires_grad_(old.requires_grad)
        return _apart(found)


def _apart(found: Mapping[int | str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    positional = tuple(value for key, value in found.items() if isinstance(key, int))
    return positional, {key: v for key, v in found.items() if isinstance(key, str)}


def _named(args: Mapping[int | str, Any], name: str) -> tuple[tuple[int | str, int], ...]:
    if name not in DIMENSIONS:
        raise UnknownDimensionError(
            f"Got dim={name!r}.{nearest(name, DIMENSIONS)} Expected one of {', '.join(NAMES)}, or "
            "{argument index: dimension}."
        )
    place = DIMENSIONS[name]
    tensors = [
        (index, arg)
        for index, arg in args.items()
        if isinstance(arg, torch.Tensor) and arg.dim() > place
    ]
    if not tensors:
        raise UnknownDimensionError(
            f"No argument has a {name} (dimension {place}): the arguments are {_shapes(args)}. "
            "Expected a tensor with that dimension, or {argument index: dimension}."
        )
    size = tensors[0][1].shape[place]
    return tuple((index, place) for index, arg in tensors if arg.shape[place] == size)


def _shapes(args: Mapping[int | str, Any]) -> str:
    return ", ".join(
        str(list(arg.shape)) if isinstance(arg, torch.Tensor) else type(arg).__name__
        for arg in args.values()
    )
