"""What users hand in, looked at before anything is done with it."""

from __future__ import annotations

from typing import Any

from torch import nn

from ckpt_pass._errors import CkptPassError


class NotAModuleError(CkptPassError, TypeError):
    """Something else than a module was given as the model."""


def check_module(model: Any, tool: str) -> None:
    """Look at what was given as a model.

    Args:
        model: what was given.
        tool: the function that it was given to.

    Raises:
        NotAModuleError: it is no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise NotAModuleError(
            f"{tool} got {model!r} of type {type(model).__name__}, expected a model: an "
            "nn.Module. A function becomes one as the forward of a class of yours; a loss goes "
            "into loss_fn=..."
        )
