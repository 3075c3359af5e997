"""Caches of keys and values, which Hugging Face decoders fill in training, too.

A layer that is recomputed needs none of it: it attends to its own keys. Kept, the cache would hold
the keys and values of all layers from the forward to the backward. Transformers' own checkpointing
layers switch it off, and so do regions.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_NAMES = frozenset(("past_key_values", "past_key_value", "layer_past"))


def without_cache(root: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A region's arguments without a cache that is empty as far as its layer goes.

    A cache with entries (of a prefix that is trained) stays; it is put back for the recomputation
    as any object. So does one of layers that only read it.
    """
    names = [name for name in kwargs if name in _NAMES and _is_cache(kwargs[name])]
    if not names or not isinstance(root, nn.Module):
        return kwargs
    if getattr(root, "_can_checkpoint_with_cache", False):
        return kwargs
    layer = next((m.layer_idx for m in root.modules() if _has_index(m)), None)
    if layer is None or any(kwargs[name].get_seq_length(layer) for name in names):
        return kwargs
    off: dict[str, Any] = dict.fromkeys(names)
    if kwargs.get("use_cache"):
        off["use_cache"] = False
    return {**kwargs, **off}


def _is_cache(value: Any) -> bool:
    return hasattr(value, "get_seq_length") and type(value).__module__.startswith("transformers.")


def _has_index(module: nn.Module) -> bool:
    return isinstance(getattr(module, "layer_idx", None), int)
