"""Capture: a training step as a joint graph, without running it.

The trace is dynamo's own, of the model with fake tensors in the place of its own: what a backend of
``torch.compile`` will see is what is planned. Nothing is computed.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils._pytree import keystr, tree_leaves_with_path

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch import ahead, autograd, compilers
from ckpt_pass.graph.joint import JointGraph, read_joint
from ckpt_pass.state.holders import Reached
from ckpt_pass.state.untouched import untouched

LossFn = Callable[[Any], torch.Tensor]


class NotTraceableError(CkptPassError):
    """The model cannot be traced with fake tensors; the cause is chained."""


class NothingToDifferentiateError(CkptPassError):
    """No output of the model depends on anything that requires a gradient."""


class SeveralGraphsError(NotTraceableError):
    """``torch.compile`` makes no single graph of the step, and the tool needs one."""


def whole_step(model: nn.Module, loss_fn: LossFn | None) -> Callable[..., Any]:
    """The model followed by the user's loss function, named as the model alone is.

    Every call makes code of its own: dynamo counts compilations by code.
    """
    if loss_fn is None:
        return model
    apply_loss = loss_fn

    def step(*args: Any, **kwargs: Any) -> torch.Tensor:
        return apply_loss(model(*args, **kwargs))

    step.__code__ = step.__code__.replace()
    return step


@contextlib.contextmanager
def capture(
    model: nn.Module,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    loss_fn: LossFn | None = None,
    dynamic: bool = False,
    regions: tuple[str, ...] | None = None,
) -> Iterator[JointGraph]:
    """The one joint graph that ``torch.compile`` makes of ``model(*args, **kwargs)``.

    As :func:`capture_all`, for what is asked of a whole step.

    Raises:
        SeveralGraphsError: dynamo cuts the step; the message says where.
        NotTraceableError, NothingToDifferentiateError: as there.
    """
    how: dict[str, Any] = {"loss_fn": loss_fn, "dynamic": dynamic, "regions": regions}
    with capture_all(model, *args, kwargs=kwargs, **how) as joints:
        yield _only(model, joints)


@contextlib.contextmanager
def capture_all(
    model: nn.Module,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    loss_fn: LossFn | None = None,
    dynamic: bool = False,
    regions: tuple[str, ...] | None = None,
) -> Iterator[tuple[JointGraph, ...]]:
    """The joint graphs that ``torch.compile`` makes of ``model(*args, **kwargs)``, in order.

    Nothing is computed, and everything is left as it was (:mod:`ckpt_pass.state.untouched`).
    Where dynamo cuts the step, the code between its graphs runs on fake tensors; where that code
    looks at values, the forward runs once for real.

    Args:
        model: the module; its parameters are untouched.
        args, kwargs: its arguments; tensors stand for their shapes and dtypes only, real, fake and
            ``meta`` ones alike.
        loss_fn: applied to the model's output, where the model does not return a loss.
        dynamic: leave sizes symbolic, as ``torch.compile(dynamic=True)``.
        regions: FQN patterns of the layers.

    Raises:
        NotTraceableError: the trace failed; the message says where in the user's code.
        NothingToDifferentiateError: there is no backward to look at.
    """
    named = dict(kwargs or {})
    how = _How(model, loss_fn, args, named, dynamic)
    try:
        found = how.on_fakes()
    except autograd.NO_VALUES as error:
        if not how.has_values:
            raise untraceable(model, error) from error
        found = how.for_real()
    except CkptPassError:
        raise
    except Exception as error:  # re-raised with the place in the user's code
        raise untraceable(model, error) from error
    graphs, words = found
    _check(model, graphs)
    cut = (
        "" if graphs.whole else "; ".join(graphs.breaks() or ["code that dynamo leaves to Python"])
    )
    joints = tuple(_joint(captured, words, regions, cut) for captured in graphs.captured)
    del found, graphs  # and what was real of the step
    yield joints


@dataclass(frozen=True)
class _How:
    """A step, and the two ways to run dynamo over it."""

    model: nn.Module
    loss_fn: LossFn | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic: bool

    @property
    def _roots(self) -> tuple[Any, ...]:
        return self.model, self.loss_fn, self.args, self.kwargs

    @property
    def has_values(self) -> bool:
        """Whether the step can run for real."""
        tensors = Reached(self._roots).tensors
        return not any(autograd.is_fake(tensor) or tensor.is_meta for tensor in tensors)

    def on_fakes(self) -> _Found:
        """On fake tensors: nothing is computed."""
        fakes = ahead.Fakes(Reached(self._roots).tensors)
        with untouched(*self._roots, stand_in=fakes) as (_, _, args, kwargs):
            return self._graphs(args, kwargs, fakes.mode)

    def for_real(self) -> _Found:
        """On the step's own tensors: the forward runs."""
        with untouched(*self._roots, values=True):
            return self._graphs(self.args, self.kwargs, None)

    def _graphs(self, args: tuple[Any, ...], kwargs: dict[str, Any], mode: Any) -> _Found:
        words = _words(self.model, args, kwargs)
        step = whole_step(self.model, self.loss_fn)
        return ahead.step_graphs(step, args, kwargs, mode, self.dynamic), words


_Found: TypeAlias = tuple[ahead.Graphs, dict[int, str]]


def _joint(
    found: ahead.Captured, words: Mapping[int, str], regions: tuple[str, ...] | None, cut: str
) -> JointGraph:
    names = [
        words.get(id(example)) or compilers.placeholder_source(node)
        for node, example in zip(found.placeholders, found.examples, strict=True)
    ]
    found.module.graph.eliminate_dead_code()
    static = found.options.get("static_lifetime_input_indices") or ()
    joint = read_joint(found.module, found.options["num_fwd_outputs"], static, regions, names)
    joint.graph_break = cut
    return joint


def _words(model: nn.Module, args: Any, kwargs: Any) -> dict[int, str]:
    """What the tensors of a step are, in the user's words."""
    given = [*enumerate(args), *kwargs.items()]
    found: dict[int, str] = {}
    for key, value in given:
        for path, leaf in tree_leaves_with_path(value):
            found.setdefault(id(leaf), f"argument {key}{keystr(path)}")
    for name, buffer in model.named_buffers():
        found[id(buffer)] = f"buffer {name}"
    for name, parameter in model.named_parameters():
        found[id(parameter)] = f"parameter {name}"
    return found


def _check(model: nn.Module, graphs: ahead.Graphs) -> None:
    """Raise unless there is a graph with a backward.

    Raises:
        NothingToDifferentiateError, NotTraceableError: there is none.
    """
    if not graphs.seen:
        raise NotTraceableError(
            f"torch.compile made no graph of {type(model).__name__}. Expected a step that it "
            "compiles: look for torch.compiler.disable, for a stance other than the default, and "
            "for what torch never compiles (RNN modules). TORCH_LOGS=graph_breaks says more; "
            "mode='eager' plans the step as it runs without torch.compile."
        )
    if not graphs.captured:
        raise no_gradient(model)


def _only(model: nn.Module, joints: tuple[JointGraph, ...]) -> JointGraph:
    """The graph that has the step's backward.

    Raises:
        SeveralGraphsError: there is not one.
    """
    if len(joints) == 1:
        return joints[0]
    raise SeveralGraphsError(
        f"torch.compile makes {len(joints)} graphs with a backward of {type(model).__name__}: it "
        f"cuts the step at {joints[0].graph_break}. Expected a step of one graph: what is asked "
        "here is asked of a whole step. Take the graph breaks away (torch.compile(..., "
        "fullgraph=True) is an error at each, TORCH_LOGS=graph_breaks lists them), plan each graph "
        "(ckpt_pass.plan), or plan the step as it runs without torch.compile (mode='eager')."
    )


def no_gradient(model: nn.Module) -> NothingToDifferentiateError:
    """The error for a model of which nothing requires a gradient."""
    return NothingToDifferentiateError(
        f"No output of {type(model).__name__} requires a gradient, so there is no backward. "
        "Expected a model with parameters (or inputs) that require gradients, in grad mode."
    )


def untraceable(model: nn.Module, error: BaseException) -> NotTraceableError:
    """The error for a model whose trace failed, with the place in the user's code."""
    frame = _user_frame(error)
    place = f" at {frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" if frame else ""
    cause = getattr(error, "inner_exception", error)  # what dynamo wraps
    words = str(cause).strip().splitlines()
    return NotTraceableError(
        f"{type(model).__name__} cannot be traced{place} ({type(cause).__name__}: "
        f"{words[0] if words else 'no message'}). Expected a model whose "
        "Python does not look at tensor values; keep .item(), data-dependent shapes and calls "
        "into other libraries out of the traced step, or wrap them in a custom op."
    )


def _user_frame(error: BaseException) -> traceback.FrameSummary | None:
    """The innermost frame outside torch and this library: of dynamo's trace, or of what ran."""
    own = __name__.partition(".")[0]
    traced = getattr(error, "real_stack", None)
    if traced:
        frame: traceback.FrameSummary = traced[-1]
        return frame
    frames = [
        frame
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__", "").partition(".")[0] not in ("torch", own, "contextlib")
    ]
    if not frames:
        return None
    found = frames[-1]
    return next(
        summary
        for summary in reversed(traceback.extract_tb(error.__traceback__))
        if summary.filename == found.f_code.co_filename and summary.name == found.f_code.co_name
    )
