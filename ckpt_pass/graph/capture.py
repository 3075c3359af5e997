"""Capture: a training step as a joint graph, without running it.

The trace is non-strict: the model's own Python runs, once, on fake tensors, so that nothing is
computed and no graph break can hide a part of the model. Module names come from hooks that are in
place during the trace only.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch import functorch
from ckpt_pass.graph.joint import JointGraph, input_name
from ckpt_pass.policy.module_stack import ModuleStack

LossFn = Callable[[Any], torch.Tensor]


class NotTraceableError(CkptPassError):
    """The model cannot be traced with fake tensors; the cause is chained."""


class NothingToDifferentiateError(CkptPassError):
    """No output of the model depends on anything that requires a gradient."""


class _WithLoss(nn.Module):
    """The model followed by the user's loss function."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, *args: Any) -> torch.Tensor:
        return self.loss_fn(self.model(*args))


class _TiesKept(nn.Module):
    """A model with each of its tensors once, under the first of their names.

    torch's export takes tied tensors for several, so that their gradients stay apart. Here the
    tensors are in a tree of holders, and stand in for the model's own, which is no submodule.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._call = partial(functorch.call_with, model)
        for name, parameter in model.named_parameters():
            holder, leaf = self._holder_of(name)
            holder.register_parameter(leaf, parameter)
        for name, buffer in model.named_buffers():
            holder, leaf = self._holder_of(name)
            holder.register_buffer(leaf, buffer)

    def _holder_of(self, name: str) -> tuple[nn.Module, str]:
        *path, leaf = name.split(".")
        holder: nn.Module = self
        for part in path:
            if part not in holder._modules:
                holder.add_module(part, nn.Module())
            holder = holder.get_submodule(part)
        return holder, leaf

    def __call__(self, *args: Any) -> Any:  # not ``forward``: this is no call of the model's
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return self._call(tensors, args)


@contextlib.contextmanager
def capture(
    model: nn.Module,
    *args: Any,
    loss_fn: LossFn | None = None,
    dynamic: bool = False,
    regions: tuple[str, ...] | None = None,
) -> Iterator[JointGraph]:
    """Trace forward and backward of ``model(*args)``; nothing is computed and nothing kept.

    The graph is valid inside the ``with`` block.

    Args:
        model: the module; its parameters are untouched.
        args: its arguments; tensors stand for their shapes and dtypes only.
        loss_fn: applied to the model's output, where the model does not return a loss.
        dynamic: leave the sizes of ``args`` symbolic.
        regions: FQN patterns of the layers.

    Raises:
        NotTraceableError: the trace failed; the message says where in the user's code.
        NothingToDifferentiateError: there is no backward to look at.
    """
    root = model if loss_fn is None else _WithLoss(model, loss_fn)
    with contextlib.ExitStack() as stack:
        with ModuleStack(model).recorded_in_graph():
            try:
                module, num_fwd_outputs = functorch.export_joint(
                    stack, _TiesKept(root), args, dynamic
                )
            except CkptPassError:
                raise
            except Exception as error:  # re-raised with the place in the user's code
                raise untraceable(model, error) from error
        yield _read(model, module, num_fwd_outputs, regions)


def no_gradient(model: nn.Module) -> NothingToDifferentiateError:
    """The error for a model of which nothing requires a gradient."""
    return NothingToDifferentiateError(
        f"No output of {type(model).__name__} requires a gradient, so there is no backward. "
        "Expected a model with parameters (or inputs) that require gradients, in grad mode."
    )


def _read(
    model: nn.Module, module: Any, num_fwd_outputs: int, regions: tuple[str, ...] | None
) -> JointGraph:
    placeholders = module.graph.find_nodes(op="placeholder")
    if not any(functorch.is_backward_input(node) for node in placeholders):
        raise no_gradient(model)
    module.graph.eliminate_dead_code()
    primals = [node for node in placeholders if functorch.is_primal(node)]
    names = {node.name: input_name(node, ()) for node in primals}
    static = tuple(node for node in primals if not names[node.name].startswith("argument"))
    return JointGraph(module, num_fwd_outputs, names, static, regions)


def untraceable(model: nn.Module, error: BaseException) -> NotTraceableError:
    """The error for a model whose trace failed, with the place in the user's code."""
    frame = _user_frame(error.__traceback__)
    place = f" at {frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" if frame else ""
    return NotTraceableError(
        f"{type(model).__name__} cannot be traced{place} ({type(error).__name__}: "
        f"{str(error).splitlines()[0] if str(error) else 'no message'}). Expected a model whose "
        "Python does not look at tensor values; keep .item(), data-dependent shapes and calls "
        "into other libraries out of the traced step, or wrap them in a custom op."
    )


def _user_frame(trace: TracebackType | None) -> traceback.FrameSummary | None:
    """The innermost frame outside torch and this library."""
    own = __name__.partition(".")[0]
    frames = [
        frame
        for frame, _ in traceback.walk_tb(trace)
        if frame.f_globals.get("__name__", "").partition(".")[0] not in ("torch", own, "contextlib")
    ]
    if not frames:
        return None
    found = frames[-1]
    return next(
        summary
        for summary in reversed(traceback.extract_tb(trace))
        if summary.filename == found.f_code.co_filename and summary.name == found.f_code.co_name
    )
