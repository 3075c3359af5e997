"""The arguments of a model, from a call of a function of ours."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ckpt_pass._errors import CkptPassError, nearest


class StepArgumentError(CkptPassError):
    """The arguments of a step are not those that the model takes."""


def step_arguments(
    model: nn.Module,
    tool: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    named: Mapping[str, Any],
) -> dict[str, Any]:
    """The keyword arguments of a model, from a call of a function of ours.

    Args:
        model: it gets them.
        tool: the function that was called; a name that is no argument of the model's may be an
            option of it, misspelt.
        args: the model's positional arguments.
        kwargs, named: its keyword arguments, as a mapping and by name.

    Raises:
        StepArgumentError: the model's forward does not take them, or it is no model.
    """
    found = {**named, **(kwargs or {})}
    if not isinstance(model, nn.Module):
        raise StepArgumentError(
            f"{tool.__name__} got {model!r} of type {type(model).__name__}, expected a model: an "
            "nn.Module. A function becomes one as the forward of a class of yours; a loss goes "
            "into loss_fn=..."
        )
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # code without a signature
        return found
    try:
        signature.bind(*args, **found)
    except TypeError as error:
        options = options_of(tool)
        unknown = [name for name in named if name not in signature.parameters]
        near = nearest(unknown[0], [*options, *signature.parameters]) if unknown else ""
        raise StepArgumentError(
            f"{type(model).__name__}.forward{signature} does not take the arguments given: {error}."
            f"{near} Expected the arguments of one call of the model; the options of "
            f"{tool.__name__} are {', '.join(options)}. An argument of the model that has one of "
            "these names goes into kwargs={...}."
        ) from None
    return found


def options_of(tool: Callable[..., Any]) -> list[str]:
    """The names that a function of ours takes for itself, not for the model."""
    parameters = inspect.signature(tool).parameters.values()
    return [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
