"""Names for the tensors and objects that regions hold: what messages say, and runs remember."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ckpt_pass._torch import modules
from ckpt_pass.regions.contents import Contents
from ckpt_pass.regions.holders import Holders
from ckpt_pass.state.code_names import contents_of


def name_of(thing: Any, roots: tuple[Any, ...], holders: Holders, held: Contents) -> str:
    """A name for a tensor or an object.

    Args:
        thing: what has it.
        roots: what the holders were found from.
        holders, held: where to look, and what they held.
    """
    for root in roots:
        for name, module in _modules(root):
            for kind, key, value in _members(module):
                if value is thing:
                    where = f"{name}.{key}" if name else str(key)
                    return f"{kind} {where!r} of {type(module).__name__}"
    for space, name, value in holders.spots:
        if value is thing:
            kind = "The global" if isinstance(space, dict) else "The attribute"
            return f"{kind} {name!r}"
    for sequence, items in zip(holders.lists, held.lists, strict=True):
        for index, value in enumerate(items):
            if value is thing:
                return f"Element {index} of a {type(sequence).__name__}"
    for mapping, entries in zip(holders.maps, held.maps, strict=True):
        for key, value in entries.items():
            if value is thing:
                return f"Entry {key!r} of a {type(mapping).__name__}"
    for own in held.copies:
        for key, value in own.items():
            if value is thing:
                return f"Attribute {key!r}"
    return f"A {type(thing).__name__}"


def _modules(root: Any) -> Iterator[tuple[str, nn.Module]]:
    owner = root if isinstance(root, nn.Module) else getattr(root, "__self__", None)
    if isinstance(owner, nn.Module):
        yield from owner.named_modules()
    for cell in getattr(root, "__closure__", None) or ():
        for value in contents_of(cell):
            if isinstance(value, nn.Module):
                yield from value.named_modules()


def _members(module: nn.Module) -> Iterator[tuple[str, str, Any]]:
    own = module.__dict__
    if isinstance(module, torch.jit.ScriptModule):
        names = modules.script_attributes(module)
        yield from (("Attribute", name, getattr(module, name)) for name in names)
        return
    for kind, held in (
        ("Parameter", own.get("_parameters")),
        ("Buffer", own.get("_buffers")),
        ("Attribute", own),
    ):
        for key, value in dict.items(held or {}):
            yield kind, key, value
            if kind == "Attribute" and isinstance(value, (list, tuple)):
                yield from (("Element", f"{key}[{n}]", item) for n, item in enumerate(value))
            elif kind == "Attribute" and isinstance(value, dict) and not key.startswith("_"):
                yield from (("Entry", f"{key}[{n!r}]", item) for n, item in value.items())
