"""Capture: a training step as a joint graph, without running it.

The trace is dynamo's own, of the model with fake tensors in the place of its own: what a backend of
``torch.compile`` will see is what is planned. Nothing is computed.
"""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch.utils._pytree import keystr, tree_leaves_with_path

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch import ahead, autograd, compilers
from ckpt_pass._torch.collector import quiet_collector
from ckpt_pass.graph.gradients import leaves_among
from ckpt_pass.graph.joint import JointGraph, read_joint
from ckpt_pass.state.holders import Reached
from ckpt_pass.state.untouched import untouched

LossFn = Callable[[Any], torch.Tensor]
#: ``look(graph, inputs, names)``: dynamo's graph, and what its inputs are in the user's words.
Look = Callable[[fx.GraphModule, Sequence[Any], list[str]], None]


class NotTraceableError(CkptPassError):
    """The model cannot be traced with fake tensors; the cause is chained."""


class NothingToDifferentiateError(CkptPassError):
    """No output of the model depends on anything that requires a gradient."""


class FirstUseWarning(UserWarning):
    """The step sets what the next one finds there: a plan of it is not one of the next."""


class SeveralGraphsError(NotTraceableError):
    """``torch.compile`` makes no single graph of the step, so that no plan is of all of it."""


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
    look: Look | None = None,
) -> Iterator[JointGraph]:
    """The joint graph that ``torch.compile`` makes of ``model(*args, **kwargs)``.

    Nothing is computed, and everything is left as it was (:mod:`ckpt_pass.state.untouched`).
    Where dynamo cuts the step, the code between its graphs runs on fake tensors.

    Args:
        model: the module; its parameters are untouched.
        args, kwargs: its arguments; tensors stand for their shapes and dtypes only, real, fake and
            ``meta`` ones alike.
        loss_fn: applied to the model's output, where the model does not return a loss.
        dynamic: leave sizes symbolic, as ``torch.compile(dynamic=True)``.
        regions: FQN patterns of the layers.
        look: told dynamo's graph where that holds the whole step, as a compiler would be.

    Raises:
        NotTraceableError: the trace failed; the message says where in the user's code.
        SeveralGraphsError: dynamo cuts the step; the message says where.
        NothingToDifferentiateError: there is no backward to look at.
    """
    named = dict(kwargs or {})
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet_collector(collect_first=False))
        roots = (model, loss_fn, args, named)
        reached = Reached(roots)
        fakes = ahead.Fakes(reached.tensors)
        _, _, fake_args, fake_named = stack.enter_context(
            untouched(*roots, stand_in=fakes, reached=reached)
        )
        words = input_words(model, fake_args, fake_named)

        def names_of(placeholders: Sequence[fx.Node], examples: Iterable[Any]) -> list[str]:
            return [
                words.get(id(example)) or compilers.placeholder_source(node)
                for node, example in zip(placeholders, examples, strict=True)
            ]

        def told(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
            assert look is not None
            nodes = gm.graph.find_nodes(op="placeholder")
            look(gm, inputs, names_of(nodes, map(ahead.example, nodes)))

        try:
            step = whole_step(model, loss_fn)
            graphs = ahead.step_graphs(
                step, fake_args, fake_named, fakes.mode, dynamic, told if look else None
            )
        except CkptPassError:
            raise
        except autograd.NO_VALUES as error:  # of code that dynamo leaves to Python
            raise SeveralGraphsError(
                f"{untraceable(model, error)} torch.compile cuts the step there."
            ) from error
        except Exception as error:  # re-raised with the place in the user's code
            raise_for(model, error)
        _warn_of_first_use(model, graphs)
        found = _only(model, graphs)
        names = names_of(found.placeholders, found.examples)
    found.module.graph.eliminate_dead_code()
    static = found.options.get("static_lifetime_input_indices") or ()
    outputs, leaves = found.options["num_fwd_outputs"], leaves_among(found.examples)
    joint = read_joint(found.module, outputs, static, regions, names, leaves)
    joint.graph_break = "" if graphs.whole else "; ".join(graphs.breaks())
    yield joint


def _warn_of_first_use(model: nn.Module, graphs: ahead.Graphs) -> None:
    """Say what the step makes when it first runs, if anything."""
    if not graphs.first_used:
        return
    names = {id(module): name for name, module in model.named_modules()}
    found = [
        name if module is None else f"{names.get(id(module), type(module).__name__)}.{name}"
        for module, name in graphs.first_used
    ]
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    warnings.warn(
        f"{type(model).__name__} sets {found[0].lstrip('.')}{more} where it finds no tensor: the "
        "next step finds one, and torch.compile makes another graph of it, which this plan is not "
        "for. Run the model once before you plan and compile it, or give the backend the budget "
        "instead of a plan.",
        FirstUseWarning,
        stacklevel=2,
    )


def input_words(model: nn.Module, args: Any, kwargs: Any) -> dict[int, str]:
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


def _only(model: nn.Module, graphs: ahead.Graphs) -> ahead.Captured:
    """The graph that has the step's backward.

    Raises:
        NothingToDifferentiateError, NotTraceableError, SeveralGraphsError: there is not one.
    """
    if not graphs.seen or (graphs.trains and not graphs.captured):
        raise no_graph(model)
    if not graphs.captured:
        raise no_gradient(model)
    if graphs.whole or (len(graphs.captured) == 1 and graphs.breaks() and max(graphs.runs) == 1):
        return graphs.captured[0]
    places = graphs.breaks() or ["a place in code that it leaves to Python"]
    raise SeveralGraphsError(
        f"torch.compile makes {len(graphs.seen)} graphs of {type(model).__name__}, "
        f"{len(graphs.captured)} with a backward: it cuts the step at {'; at '.join(places)}. "
        "What was asked for is of one graph, and would not cover the others, nor what runs between "
        "them. Expected a step without graph breaks (torch.compile(..., fullgraph=True) is an "
        "error at each, TORCH_LOGS=graph_breaks lists them). Take them away; or plan all graphs "
        "together (ckpt_pass.plan, whose StepPlan can be carried out), or the step as it runs "
        "without torch.compile (mode='eager')."
    )


def no_graph(model: nn.Module) -> NotTraceableError:
    """The error for a model that dynamo leaves to Python as a whole."""
    return NotTraceableError(
        f"torch.compile made no graph of {type(model).__name__} that has a backward. Expected a "
        "step that it compiles: look for torch.compiler.disable, for a stance other than the "
        "default, for graph breaks in loops, and for what torch never compiles (RNN modules, some "
        "autograd Functions). TORCH_LOGS=graph_breaks says more; mode='eager' plans the step as it "
        "runs without torch.compile."
    )


def scripted_in(model: nn.Module) -> tuple[str, nn.Module] | None:
    """A module of TorchScript in a model, whose parameters nothing in Python can stand in for."""
    named = model.named_modules()
    return next((one for one in named if isinstance(one[1], torch.jit.ScriptModule)), None)


def refuse_scripted(model: nn.Module) -> None:
    """Refuse modules of TorchScript.

    Raises:
        NotTraceableError: there is one.
    """
    found = scripted_in(model)
    if found is not None:
        name, part = found
        raise NotTraceableError(
            f"{type(model).__name__} cannot be traced in eager: {name or 'it'} is a module of "
            f"TorchScript ({type(part).__name__}). Expected none in a step that is planned in "
            "eager: hand in the module that it was made of. Regions by hand and placements take "
            "it as it is."
        )


def no_gradient(model: nn.Module) -> NothingToDifferentiateError:
    """The error for a model of which nothing requires a gradient."""
    return NothingToDifferentiateError(
        f"No output of {type(model).__name__} requires a gradient, so there is no backward. "
        "Expected a model with parameters (or inputs) that require gradients, in grad mode, and of "
        "loss_fn, where one is given, a loss that depends on the output."
    )


def raise_for(model: nn.Module, error: Exception) -> NoReturn:
    """Raise what a failed trace is to the user: an error of ours that dynamo has wrapped, or

    Raises:
        NotTraceableError: with the place in the user's code.
    """
    ours = getattr(error, "inner_exception", None)  # dynamo wraps what a backend raises
    if isinstance(ours, CkptPassError):
        raise ours from None
    raise untraceable(model, error) from error


def untraceable(model: nn.Module, error: BaseException) -> NotTraceableError:
    """The error for a model whose trace failed, with the place in the user's code."""
    frame = _user_frame(error)
    place = f" at {frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" if frame else ""
    cause = getattr(error, "inner_exception", error)  # what dynamo wraps
    return NotTraceableError(
        f"{type(model).__name__} cannot be traced{place} ({type(cause).__name__}: "
        f"{_told_by(cause)}). Expected {_expected_of(cause)}"
    )


def _told_by(cause: BaseException) -> str:
    """What an error says in one line: dynamo's first one is a heading."""
    lines = [line.strip() for line in str(cause).strip().splitlines()]
    explained = (line.removeprefix(_EXPLAINED) for line in lines if line.startswith(_EXPLAINED))
    return next(explained, lines[0] if lines else "no message")


#: How dynamo begins the line that says what happened.
_EXPLAINED = "Explanation: "
_LOOKS = (
    "a model whose Python does not look at tensor values; keep .item(), data-dependent shapes "
    "and calls into other libraries out of the traced step, or wrap them in a custom op."
)
_RUNS = (
    f"a step that runs by itself with these arguments: try model(*args) first. If it does, {_LOOKS}"
)
_TRANSFORM = (
    "no transform of torch.func in the forward of a step that is planned in eager: plan it "
    "compiled, without mode='eager'."
)
#: What the error of a trace says, and what would be right.
_BY_WORDS = {
    "saved tensor hooks": "no transform of torch.func (grad, vjp, hessian) in the forward of a "
    "step that is planned in eager: plan it compiled, without mode='eager', or take the gradient "
    "there by torch.autograd.grad.",
    "TensorWrapper": _TRANSFORM,
    "BatchedTensorImpl": _TRANSFORM,
    "double backward": "no gradient of a gradient through compiled code, which torch.compile does "
    "not make: plan the step as it runs without it (mode='eager').",
    "failed to run FX node": _RUNS,
}
#: Errors of a program, not of a trace.
_OF_PROGRAMS = (
    AttributeError,
    KeyError,
    IndexError,
    NameError,
    TypeError,
    ValueError,
    AssertionError,
    ArithmeticError,
)


def _expected_of(cause: BaseException) -> str:
    for words, expected in _BY_WORDS.items():
        if words in str(cause):
            return expected
    # Torch's classes of errors are made of RuntimeError: of itself it is an op's, on wrong shapes.
    is_programs = isinstance(cause, _OF_PROGRAMS) or type(cause) is RuntimeError
    return _RUNS if is_programs else _LOOKS


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
