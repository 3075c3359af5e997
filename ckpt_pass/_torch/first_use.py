"""What a step sets where it finds nothing: from then on it is another step to dynamo."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.variables import ConstDictVariable, TensorVariable
from torch._dynamo.variables.lists import BaseListVariable
from torch._dynamo.variables.misc import NewGlobalVariable


def set_at_first_use() -> Iterator[tuple[nn.Module | None, str]]:
    """What the code of a graph looks for and then sets to a tensor, or to a tuple that has one.

    Asked while dynamo calls its backend. An attribute of a module comes with that module; what is
    put into a dict or a global of a file in words. What is only written does not count: nothing
    depends on whether it is there.
    """
    translator = InstructionTranslator.current_tx()
    looked_for = {_place(guard) for guard in translator.output.guards}
    effects = translator.output.side_effects
    for owner, changes in effects.store_attr_mutations.items():
        source, value = _name_of(owner), getattr(owner, "value", None)
        if source is None:
            continue
        of_file = isinstance(owner, NewGlobalVariable)  # its source names the global itself
        for name, new in changes.items():
            place = source if of_file else f"{source}.{name}"
            asked = not looked_for.isdisjoint({place, (source, name)})
            was_there = isinstance(getattr(value, name, None), torch.Tensor)
            if not asked or was_there or not _has_tensor(new):
                continue
            yield (value, name) if isinstance(value, nn.Module) else (None, _in_words(place))
    objects = {id(found): found for found in effects.keepalive}
    for number, variable in effects.id_to_variable.items():
        if not isinstance(variable, ConstDictVariable):
            continue
        source = _name_of(variable)
        if source is not None and effects.is_modified(variable):
            for place in _filled(variable, objects.get(number), source, looked_for):
                yield None, _in_words(place)


def _name_of(variable: Any) -> str | None:
    """Where dynamo found an object; ``None`` of one that the step itself makes.

    What is made in the step may have a source that torch refuses to name: no guard can look at it.
    """
    source = getattr(variable, "source", None)
    try:
        return None if source is None else str(source.name)
    except NotImplementedError:  # TempLocalSource, SyntheticLocalSource (torch 2.13)
        return None


def _filled(
    variable: ConstDictVariable, was: Any, name: str, looked_for: set[object]
) -> Iterator[str]:
    """The places of a dict where a tensor is now, and nothing or ``None`` was looked at.

    Args:
        variable: the dict.
        was: the same as it was: of a module's, dynamo knows only what was asked for.
        name: of the dict.
        looked_for: places.
    """
    before = variable.original_items
    held = was if isinstance(was, dict) else {}
    for key, value in variable.items.items():
        known, vt = before.get(key), getattr(key, "vt", None)
        if known is value or not _has_tensor(value) or not vt or not vt.is_python_constant():
            continue
        if isinstance(held.get(vt.as_python_constant()), torch.Tensor):
            continue
        place = f"{name}[{vt.as_python_constant()!r}]"
        missing = known is None and (name, vt.as_python_constant()) in looked_for
        if missing or (known is not None and not _has_tensor(known) and place in looked_for):
            yield place


def _has_tensor(value: Any) -> bool:
    value = value.unwrap()  # one that dynamo has not looked at is none itself
    if isinstance(value, BaseListVariable):
        return any(map(_has_tensor, value.items))
    return isinstance(value, TensorVariable)


def _place(guard: Any) -> object:
    """What a guard looks at: a source, or an attribute or key of one that may be missing."""
    options = getattr(guard.create_fn, "keywords", {})
    for word in ("attr", "key"):
        if word in options and isinstance(options[word], (str, int, tuple)):
            return guard.name, options[word]
    return guard.name


def _in_words(source: str) -> str:
    """``G['__import_own_dot_rotary'].Rotary.tables['k']`` is ``own.rotary.Rotary.tables['k']``."""
    return re.sub(
        r"^[GL]\['(?:__import_)?(\w+)'\]", lambda found: found[1].replace("_dot_", "."), source
    )
