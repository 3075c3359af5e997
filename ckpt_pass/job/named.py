"""Optimizers by name, as a command line gives them."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ckpt_pass._errors import CkptPassError, nearest
from ckpt_pass.graph.capture import no_gradient

_CALL = re.compile(r"\s*(\w+)\s*(?:\((.*)\))?\s*")


class UnknownOptimizerError(CkptPassError):
    """A name that is none of torch's optimizers, or options that it does not take."""


def optimizer_names() -> tuple[str, ...]:
    """The classes in ``torch.optim`` that step on gradients alone."""
    classes = (value for value in vars(torch.optim).values() if inspect.isclass(value))
    found = (cls for cls in classes if issubclass(cls, torch.optim.Optimizer))
    apart = (torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam)
    return tuple(sorted(cls.__name__ for cls in found if cls not in apart))


def optimizer_named(text: str, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a model that a text such as ``AdamW`` or ``SGD(momentum=0.9)`` means.

    Args:
        text: a class of ``torch.optim``, in any case of letters, and options that are literals.
        model: whose parameters it steps.

    Raises:
        UnknownOptimizerError: there is no such class, or it does not take the options.
        NothingToDifferentiateError: no parameter requires a gradient.
    """
    cls, options = optimizer_class(text)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise no_gradient(model)
    try:
        return cls(trained, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _not_taken(cls, text, error) from error


def optimizer_class(text: str) -> tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]:
    """The class that a text means, and its options.

    Raises:
        UnknownOptimizerError: there is no such class, or the options are no literals.
    """
    match = _CALL.fullmatch(text)
    known = {name.lower(): name for name in optimizer_names()}
    name = known.get(match[1].lower()) if match is not None else None
    if match is None or name is None:
        near = nearest(match[1] if match else text, known.values())
        raise UnknownOptimizerError(
            f"Got optimizer {text!r}.{near} Expected one of "
            f"{', '.join(known.values())}, with options if any: 'SGD(momentum=0.9)'."
        )
    cls = getattr(torch.optim, name)
    try:
        return cls, _options(match[2] or "")
    except (ValueError, SyntaxError) as error:
        raise _not_taken(cls, text, error) from error


def _not_taken(cls: Any, text: str, error: Exception) -> UnknownOptimizerError:
    return UnknownOptimizerError(
        f"{cls.__name__} does not take the options in {text!r}: {error}. Expected such as "
        "'SGD(momentum=0.9)' or 'AdamW(foreach=True)'."
    )


def _options(text: str) -> dict[str, Any]:
    """Keyword arguments whose values are literals.

    Raises:
        SyntaxError, ValueError: they are none.
    """
    call = ast.parse(f"f({text})", mode="eval").body
    if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
        raise ValueError("options are given by name")
    return {str(k.arg): _literal(str(k.arg), k.value) for k in call.keywords}


def _literal(name: str, value: ast.expr) -> Any:
    try:
        return ast.literal_eval(value)
    except ValueError:
        said = ast.unparse(value)
        raise ValueError(
            f"{name}={said} is no literal, as a number, True or (0.9, 0.99) are"
        ) from None
