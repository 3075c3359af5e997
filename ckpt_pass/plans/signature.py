"""Whether a plan is used for the step that it was made for, and what differs where it is not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ckpt_pass._errors import CkptPassError
from ckpt_pass.plans.parts import Signature
from ckpt_pass.policy.sites import optimization_hint
from ckpt_pass.version import __version__

_SYMBOL = re.compile(r"\bs\d+\b")

#: Values of one kind named in a message; the first ones tell.
_NAMED = 3


class PlanMismatchError(CkptPassError):
    """A plan is used for a step that it was not made for."""


def looks(value: torch.Tensor) -> str:
    """A tensor's dtype and shape, such as ``float32[2, 8]``."""
    sizes = ", ".join(str(size) for size in value.shape)
    return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"


def looks_now(value: torch.Tensor) -> str:
    """The same, with its sizes in this step where they are symbolic."""
    sizes = ", ".join(str(optimization_hint(size)) for size in value.shape)
    return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"


def looks_at(look: str, sizes: Mapping[str, int]) -> str:
    """How a tensor looks (:func:`looks`) with these sizes in the place of symbols."""
    return _SYMBOL.sub(lambda found: str(sizes.get(found[0], found[0])), look)


def signature(arguments: Iterable[str], parameters: Iterable[str]) -> Signature:
    """What a step takes, with the versions that are running."""
    found = tuple(sorted(arguments)), tuple(sorted(parameters))
    return Signature(str(torch.__version__), *found, library_version=__version__)


def eager_signature(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> Signature:
    """What a step of ``model(*args, **kwargs)`` takes; parameters by name."""
    given = (args, dict(kwargs or {}))
    tensors = [value for value in tree_leaves(given) if isinstance(value, torch.Tensor)]
    return signature(map(looks, tensors), _parameters(model))


def _parameters(model: nn.Module) -> list[str]:
    return [f"{name} {looks(value)}" for name, value in model.named_parameters()]


def signature_differences(planned: Signature, here: Signature) -> list[str]:
    """What differs, in words: versions, arguments, parameters."""
    found = []
    for what, mine, theirs in (
        ("torch", here.torch_version, planned.torch_version),
        ("ckpt_pass", here.library_version, planned.library_version),
    ):
        if mine != theirs:
            found.append(f"{what} {mine} here, {theirs} in the plan")
    for name in ("arguments", "parameters"):
        # As sets: tied parameters count once or twice, depending on the trace.
        new, old = set(getattr(here, name)), set(getattr(planned, name))
        if new != old:
            found.append(f"{name} {_some(new - old)} here, {_some(old - new)} in the plan")
    return found


def _some(values: set[str]) -> str:
    named = sorted(values)
    more = len(named) - _NAMED
    words = ", ".join(named[:_NAMED]) or "fewer"
    return f"{words} and {more} more" if more > 0 else words


def check_eager_step(
    planned: Signature | None,
    model: nn.Module,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Raise unless a model, and its arguments where given, look as those of an eager plan.

    Versions are named along with other differences, but are none by themselves.

    Raises:
        PlanMismatchError: it says what differs.
    """
    if planned is None:
        return
    given = None if args is None else eager_signature(model, args, kwargs)
    arguments = planned.arguments if given is None else given.arguments
    here = signature(arguments, _parameters(model))
    reasons = signature_differences(planned, here)
    if (here.arguments, here.parameters) != (planned.arguments, planned.parameters):
        raise PlanMismatchError(
            f"The plan was made for another step: {'; '.join(reasons)}. Expected the parameters "
            "and arguments of the model that was planned, by name, dtype and shape. Make the plan "
            "anew for this model and these arguments."
        )
