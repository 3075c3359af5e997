"""The arguments of a model, from a call of a function of ours."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ckpt_pass._errors import CkptPassError, nearest
from ckpt_pass.state.given import check_module


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
        NotAModuleError: the model is none.
        StepArgumentError: the model's forward does not take them.
    """
    check_module(model, tool.__name__)
    if not isinstance(kwargs, (Mapping, NoneType)):
        raise StepArgumentError(
            f"{tool.__name__} got kwargs={kwargs!r} of type {type(kwargs).__name__}, expected a "
            "mapping of the model's keyword arguments, such as kwargs={'labels': labels}."
        )
    found = {**named, **(kwargs or {})}
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


def without_histories(arguments: Any) -> Any:
    """Arguments for steps that are run again and again: what has a history becomes a leaf.

    A backward goes through a history but once; what it brings to an argument is its gradient.
    """
    leaves = {
        id(value): value.detach().requires_grad_()
        for value in tree_leaves(arguments)
        if isinstance(value, torch.Tensor) and value.grad_fn is not None
    }
    if not leaves:
        return arguments
    # What is given twice stays one tensor.
    return tree_map_only(torch.Tensor, lambda value: leaves.get(id(value), value), arguments)
