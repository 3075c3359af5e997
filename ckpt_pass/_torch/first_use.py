"""What a step sets where it finds nothing: from then on it is another step to dynamo."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.variables import TensorVariable


def set_at_first_use() -> Iterator[tuple[nn.Module, str]]:
    """The attributes of modules that the code of a graph looks for and then sets to a tensor.

    Asked while dynamo calls its backend. What is put into a dict, such as a buffer that was
    ``None``, is not seen. What is only written does not count: nothing depends on whether it is
    there.
    """
    translator = InstructionTranslator.current_tx()
    looked_for = {_place(guard) for guard in translator.output.guards}
    for owner, changes in translator.output.side_effects.store_attr_mutations.items():
        module, source = getattr(owner, "value", None), getattr(owner, "source", None)
        if not isinstance(module, nn.Module) or source is None:
            continue
        for name, value in changes.items():
            was_there = isinstance(getattr(module, name, None), torch.Tensor)
            asked = not looked_for.isdisjoint({f"{source.name}.{name}", (source.name, name)})
            if asked and not was_there and isinstance(value, TensorVariable):
                yield module, name


def _place(guard: Any) -> object:
    """What a guard looks at: a source, or an attribute of one that may be missing."""
    options = getattr(guard.create_fn, "keywords", {})
    return (guard.name, options["attr"]) if "attr" in options else guard.name
