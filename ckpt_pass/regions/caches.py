"""Caches of keys and values, which Hugging Face decoders fill in training, too.

A layer that is recomputed needs none of it: it attends to its own keys. Kept, the cache would hold
the keys and values of all layers from the forward to the backward. Transformers' own checkpointing
layers switch it off, which takes other kernels (the cache's own copies are what the attention then
reads), and so gives other last bits. A region's layer gets an empty cache of the same kind at every
run, which is let go at its end.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class EmptyCache:
    """Stands in a region's arguments for a cache that is empty as far as its layers go.

    Attributes:
        template: a cache of the same kind that holds no values; never filled.
        layers: the numbers of the region's layers.
    """

    template: Any
    layers: frozenset[int]

    @classmethod
    def of(cls, cache: Any, layers: frozenset[int]) -> EmptyCache:
        """What stands for a cache."""
        return cls(_twin(cache, lambda number, layer: _copied(layer, _emptied)), layers)

    def made(self) -> Any:
        """An empty cache, to be filled once."""

        def own(number: int, layer: Any) -> Any:
            return _copied(layer, lambda value: value) if number in self.layers else layer

        return _twin(self.template, own)


def with_empty_caches(
    root: Any, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """A region's function and arguments, where caches are empty ones, made anew at every run.

    A cache with entries (of a prefix that is trained) stays; it is put back for the recomputation
    as any object. So does one of layers that only read it.

    Args:
        root: the region's module; functions of others get what they are given.
        fn: what the region runs.
        args, kwargs: its arguments.
    """
    if not any(map(_is_cache, args)) and not any(map(_is_cache, kwargs.values())):
        return fn, args, kwargs
    layers = _layers(root)
    if not layers:
        return fn, args, kwargs

    def emptied(value: Any) -> Any:
        return EmptyCache.of(value, layers) if _is_empty(value, layers) else value

    def run(*args: Any, **kwargs: Any) -> Any:
        return fn(*map(_made, args), **{key: _made(value) for key, value in kwargs.items()})

    return run, tuple(map(emptied, args)), {key: emptied(v) for key, v in kwargs.items()}


def is_emptied(root: Any, value: Any) -> bool:
    """Whether a region of ``root`` gets an empty cache in the place of an argument."""
    return _is_cache(value) and bool(_layers(root)) and _is_empty(value, _layers(root))


def _layers(root: Any) -> frozenset[int]:
    """The numbers of the layers of a region that may get empty caches."""
    if not isinstance(root, nn.Module) or getattr(root, "_can_checkpoint_with_cache", False):
        return frozenset()
    return frozenset(number for module in root.modules() for number in _numbers(module))


def _made(value: Any) -> Any:
    return value.made() if type(value) is EmptyCache else value


def _twin(cache: Any, of_layer: Callable[[int, Any], Any]) -> Any:
    """A cache of the same kind, with containers and layers of its own."""
    twin = copy.copy(cache)
    for name, value in vars(cache).items():
        if name == "layers" and isinstance(value, list):
            made: Any = [of_layer(number, layer) for number, layer in enumerate(value)]
        elif _is_cache(value):
            made = _twin(value, of_layer)
        elif isinstance(value, (dict, list, set)):
            made = copy.copy(value)
        else:
            continue
        setattr(twin, name, made)
    return twin


def _copied(layer: Any, of_value: Callable[[Any], Any]) -> Any:
    """A layer of a cache with containers of its own, and something for each of its values."""
    twin = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            setattr(twin, name, {key: of_value(item) for key, item in value.items()})
        else:
            setattr(twin, name, of_value(value))
    return twin


def _emptied(value: Any) -> Any:
    return value.detach().new_empty(0) if isinstance(value, torch.Tensor) else value


def _is_empty(value: Any, numbers: frozenset[int]) -> bool:
    """Whether a value is a cache that holds nothing of some layers."""
    if not _is_cache(value):
        return False
    held = vars(value)
    layers = [layer for n, layer in enumerate(held.get("layers", ())) if n in numbers]
    flat = [item for layer in layers for item in vars(layer).values()]
    flat += [item for items in flat if isinstance(items, dict) for item in items.values()]
    if any(isinstance(item, torch.Tensor) and item.numel() for item in flat):
        return False
    return all(_is_empty(part, numbers) for part in held.values() if _is_cache(part))


def _is_cache(value: Any) -> bool:
    ours = type(value).__module__.startswith("transformers.")  # asked first: it costs less
    return ours and hasattr(value, "get_seq_length")


def _numbers(module: nn.Module) -> list[int]:
    """The number of the layer of which a module is a part, if it knows it."""
    found = (getattr(module, name, None) for name in ("layer_idx", "layer_id"))
    return [number for number in found if isinstance(number, int)]
