"""Look: what is saved, what is recomputed, and why."""

from __future__ import annotations

from typing import Any

from torch import nn

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch import compilers
from ckpt_pass.compile.backend import Backend
from ckpt_pass.plans.parts import SavedActivations
from ckpt_pass.plans.value import Plan
from ckpt_pass.tools.ahead import plan, plan_one


class NothingCompiledError(CkptPassError):
    """A compiled model or backend has no plan to show."""


def plans_of(compiled: Any) -> tuple[Plan, ...]:
    """The plans behind a compiled model or a backend, one for each graph that was compiled.

    Raises:
        NothingCompiledError: it was not compiled by this library, or has not run yet.
    """
    backend = compiled if isinstance(compiled, Backend) else compilers.compiled_backend(compiled)
    if not isinstance(backend, Backend):
        raise NothingCompiledError(
            f"{type(compiled).__name__} was not compiled with a ckpt backend. Expected "
            "torch.compile(model, backend=ckpt_pass.make_backend(...)), or such a backend."
        )
    if not backend.plans:
        raise NothingCompiledError(
            "The backend has made no plan yet: graphs are compiled when they first run in grad "
            "mode. Run a forward first; with inductor's cache a hit makes no plan either."
        )
    return tuple(backend.plans)


def saved_activations(model: Any, *args: Any, **options: Any) -> SavedActivations:
    """What the backward gets from the forward: values with bytes and provenance.

    Args:
        model: a plain module, traced with ``args`` (options as for :func:`plan`); or a
            compiled model or a backend, of which the newest graph is shown.

    Returns:
        The values in order; ``.saved_bytes`` is their sum on top of inputs and outputs.
    """
    return (
        plans_of(model)[-1].saved
        if not _is_plain(model)
        else plan_one(model, *args, **options).saved
    )


def explain(model: Any, *args: Any, **options: Any) -> str:
    """One line a decision: call site, op, class, bytes, fate, tag, and the rule that made it.

    Args:
        model: a plain module, traced with ``args`` (options as for :func:`plan`); or a
            compiled model or a backend, of which every graph is shown.
    """
    if not _is_plain(model):
        return "\n\n".join(plan.listing() for plan in plans_of(model))
    return plan(model, *args, **options).listing()


def _is_plain(model: Any) -> bool:
    is_compiled = isinstance(model, Backend) or hasattr(model, "_torchdynamo_orig_callable")
    return isinstance(model, nn.Module) and not is_compiled
