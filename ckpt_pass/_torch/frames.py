"""The door to dynamo's frames: where it cuts a function, and which functions it gives up."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

from torch import fx
from torch._dynamo.callback import callback_handler
from torch._dynamo.exc import Unsupported, UserError

from ckpt_pass._torch.compilers import innermost_backend

#: What follows a break is a function of its own to dynamo.
_RESUMED = re.compile(r"torch_dynamo_resume_in_(?P<name>.+)_at_(?P<line>\d+)")


@dataclass(frozen=True)
class Function:
    """A function of the user's.

    Attributes:
        filename: the path of its file.
        name: its qualified name.
        line: its first line.
    """

    filename: str
    name: str
    line: int


@dataclass(frozen=True)
class Cut:
    """Where dynamo cut a function in two, or gave it up.

    Attributes:
        filename, line: where.
        within: the name of the function there, which may be one that the compiled one calls.
        reason: why, in dynamo's words; empty where it does not say.
    """

    filename: str
    line: int
    within: str
    reason: str


@dataclass(frozen=True)
class SkippedFunction:
    """A function that dynamo gave up: it runs as it is.

    Attributes:
        function: which.
        cut: where dynamo gave up, and why.
        backend: what it was to be compiled with.
        options: those that ``torch.compile`` was given besides.
    """

    function: Function
    cut: Cut
    backend: Any
    options: Mapping[str, Any]


@dataclass(frozen=True)
class _Listener:
    """Called by dynamo after each attempt to compile a function; equal ones are the same."""

    told: Callable[[SkippedFunction], None]

    def __call__(self, _args: Any) -> None:
        error = sys.exception()
        if isinstance(error, (Unsupported, UserError)):  # dynamo lets the function run then
            found = _skipped(error)
            if found is not None:
                self.told(found)


def listen(told: Callable[[SkippedFunction], None]) -> None:
    """Be told, from now on, of each function that dynamo gives up; asking again changes nothing.

    It goes on dynamo's own list of subscribers (``torch._dynamo.callback``), which
    ``torch._dynamo.reset()`` empties. Dynamo does not try a function again that it gave up,
    whatever it is compiled with, so that it is told of once.

    Args:
        told: must not raise: dynamo counts the attempts that have not ended.
    """
    listener = _Listener(told)
    if listener not in callback_handler.end_callbacks:
        callback_handler.register_end_callback(listener)


def running_functions() -> Iterator[Function]:
    """The functions on the stack of calls, the innermost first.

    What follows a break runs inside of the function that was cut, which is on the stack, too.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        yield _function(frame.f_code)
        frame = frame.f_back


def compiled_function() -> Function | None:
    """The function that dynamo is compiling; of what follows a break the one that was cut."""
    found = _compilation()
    if found is None:
        return None
    function = _function(found["code"])
    resumed = _RESUMED.fullmatch(found["code"].co_name)
    if resumed is None:
        return function
    alike = (
        other
        for other in running_functions()
        if other.filename == function.filename and other.name.split(".")[-1] == resumed["name"]
    )
    return next(alike, function)


def cut_after(graph: fx.GraphModule) -> Cut | None:
    """Where dynamo cut a function after one of its graphs, if it did."""
    reason = getattr(graph, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    words = _first_line(reason.reason)
    return _cut(reason.user_stack[-1], words) if reason.user_stack else Cut("", 0, "", words)


def cut_before(graph: fx.GraphModule) -> Cut | None:
    """Where dynamo cut a function before one of its graphs, if it did; it does not say why."""
    stack = getattr(getattr(graph, "compile_subgraph_reason", None), "user_stack", None)
    first = stack[0] if stack else None
    resumed = _RESUMED.fullmatch(first.name) if first is not None else None
    if first is None or resumed is None:
        return None
    return Cut(first.filename, int(resumed["line"]), resumed["name"], "")


def _skipped(error: Unsupported | UserError) -> SkippedFunction | None:
    found = _compilation()
    if found is None or found.get("one_graph"):  # with one graph asked for, the error is raised
        return None
    backend, options = innermost_backend(found["compiler_fn"])
    function = compiled_function() or _function(found["code"])
    stack, words = getattr(error, "real_stack", None), _first_line(error)
    if stack:
        cut = _cut(stack[-1], words)
    else:
        cut = Cut(function.filename, function.line, function.name, words)
    return SkippedFunction(function, cut, backend, options)


def _compilation() -> Mapping[str, Any] | None:
    """What dynamo compiles, and with what; nobody is told, so its own frame is asked."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_compile" and {"code", "compiler_fn"} <= frame.f_locals.keys():
            return frame.f_locals
        frame = frame.f_back
    return None


def _function(code: CodeType) -> Function:
    return Function(code.co_filename, code.co_qualname, code.co_firstlineno)


def _cut(place: Any, reason: str) -> Cut:
    resumed = _RESUMED.fullmatch(place.name)
    return Cut(place.filename, place.lineno, resumed["name"] if resumed else place.name, reason)


def _first_line(words: object) -> str:
    lines = str(words).strip().splitlines()
    return lines[0] if lines else "no reason given"
