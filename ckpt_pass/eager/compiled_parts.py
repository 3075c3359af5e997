"""Parts of an eager step that are compiled: they are planned op by op, and run as other code."""

from __future__ import annotations

import warnings

from torch import nn

from ckpt_pass._torch.modules import is_compiled


class CompiledPartWarning(UserWarning):
    """An eager plan is made of a model of which torch.compile has compiled a part."""


def warn_of_compiled_parts(model: nn.Module) -> None:
    """Warn where modules of a model are compiled, or the model is."""
    names = [name or "the model" for name, part in model.named_modules() if is_compiled(part)]
    if not names:
        return
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    warnings.warn(
        f"{names[0]}{more} of {type(model).__name__} is compiled, and an eager plan counts its ops "
        "one by one: what inductor makes of them may hold more, so that the step is above its "
        "budget. Expected no compiled parts, or such with backend='aot_eager', which hold what is "
        "planned. Compile the whole model with make_backend(budget=...), or measure the step.",
        CompiledPartWarning,
        stacklevel=2,
    )
