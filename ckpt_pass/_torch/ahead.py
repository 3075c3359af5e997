"""Dynamo and AOTAutograd on fake tensors: the joint graphs of a step, and nothing run or kept."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import fx
from torch._dynamo import config as dynamo_config
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from ckpt_pass._torch import compilers
from ckpt_pass._torch.collector import quiet_collector
from ckpt_pass._torch.first_use import set_at_first_use
from ckpt_pass._torch.nested import inline_nested_regions
from ckpt_pass._torch.operators import was_nested_by


@dataclass(frozen=True)
class Captured:
    """One of dynamo's graphs of a step, that has a backward.

    Attributes:
        module: its joint graph, before anything was decided.
        options: what AOTAutograd passes to a partition function.
        placeholders: those of dynamo's graph, in order.
        examples: what each of them is in the step.
        graph: dynamo's graph.
    """

    module: fx.GraphModule
    options: Mapping[str, Any]
    placeholders: tuple[fx.Node, ...]
    examples: tuple[Any, ...]
    graph: fx.GraphModule


class _Joint(BaseException):
    """Ends AOTAutograd's work when the joint graph is there; no ``Exception``: nobody catches it.

    Args:
        module, options: what the partition function was called with; ``None`` without a backward.
    """

    def __init__(self, module: fx.GraphModule | None, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.module = module
        self.options = options


class _Whole(BaseException):
    """Ends dynamo's work when one graph holds the whole step."""


#: ``look(graph, inputs)`` where dynamo calls its backends.
Look = Callable[[fx.GraphModule, Sequence[Any]], None]


class Graphs:
    """The backend that keeps joint graphs and compiles nothing.

    Args:
        look: told the graph that holds the whole step, and its inputs, as a compiler would be.

    Attributes:
        captured: the graphs that have a backward, in order.
        seen: all graphs that dynamo made, in order, those without a backward among them.
        runs: how often each of them ran, which is never where one graph holds the whole step.
        whole: whether one does.
        trains: whether what the step returned, where its own code ran, has a backward.
        first_used: modules and their attributes, or places in words, that graphs look for and set.
    """

    #: Read by torch.compile to name the compiler in its logs.
    compiler_name = "ckpt_ahead"

    def __init__(self, look: Look | None = None) -> None:
        self._look = look
        self.captured: list[Captured] = []
        self.seen: list[fx.GraphModule] = []
        self.runs: list[int] = []
        self.whole = self.trains = False
        self.first_used: list[tuple[torch.nn.Module | None, str]] = []

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        inline_nested_regions(gm)
        placeholders = tuple(gm.graph.find_nodes(op="placeholder"))
        examples = tuple(example(node) for node in placeholders)
        found = _joint_of(gm, inputs)  # may ask dynamo to begin anew, by an exception
        self.first_used += set_at_first_use()
        index = len(self.seen)
        self.seen.append(gm)
        self.runs.append(0)
        if found.module is not None:
            self.captured.append(Captured(found.module, found.options, placeholders, examples, gm))
        if index == 0 and _holds_the_step(gm):
            self.whole = True
            if self._look is not None and found.module is not None:
                with _disable_current_modes():
                    self._look(gm, inputs)
            raise _Whole

        def run(*values: Any) -> Any:
            self.runs[index] += 1
            return gm.forward(*values)

        return run

    def breaks(self) -> list[str]:
        """Where dynamo ended a graph before the end of the step, and why."""
        reasons = (getattr(gm, "compile_subgraph_reason", None) for gm in self.seen)
        found = [_place(reason) for reason in reasons if reason is not None and reason.graph_break]
        return list(dict.fromkeys(found))


def _place(reason: Any) -> str:
    words = str(reason.reason).strip().splitlines()
    why = words[0] if words else "no reason given"
    if not reason.user_stack:
        return why
    frame = reason.user_stack[-1]
    return f"{Path(frame.filename).name}:{frame.lineno} in {frame.name} ({why})"


def _joint_of(gm: fx.GraphModule, inputs: Sequence[Any]) -> _Joint:
    """What ``aot_eager`` would hand to its partition function."""

    def partition(module: fx.GraphModule, _inputs: Any, **options: Any) -> Any:
        raise _Joint(module, options)

    def without_backward(_module: fx.GraphModule, _inputs: Any) -> Any:
        raise _Joint(None, {})

    backend = aot_autograd(
        fw_compiler=without_backward,
        bw_compiler=without_backward,
        partition_fn=partition,
        keep_inference_input_mutations=True,
    )
    try:
        backend(gm, inputs)
    except _Joint as found:
        return found.with_traceback(None)
    return _Joint(None, {})  # an empty graph is not compiled


def example(node: fx.Node) -> Any:
    """What an input of dynamo's graph is in the step that is compiled."""
    return getattr(node.meta.get("grapharg"), "example", None)


#: Where the frames between a call of something compiled and dynamo's own are found.
_CALLING = (
    "torch._dynamo",
    "torch.nn.modules.module",
    "contextlib",
    "torch._compile",
    compilers.__name__,
)


def _holds_the_step(gm: fx.GraphModule) -> bool:
    """Whether a first graph ends with the step, and none of the step's code is being run.

    Code is run where dynamo has left a frame to Python and compiles what that frame calls.
    """
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or reason.graph_break:
        return False
    names: list[str] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not step_graphs.__code__:
        names.append(str(frame.f_globals.get("__name__", "")))
        frame = frame.f_back
    last = max(index for index, name in enumerate(names) if name == "torch._dynamo.convert_frame")
    return all(name.startswith(_CALLING) for name in names[last:])


def step_graphs(
    step: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    mode: FakeTensorMode,
    dynamic: bool,
    look: Look | None = None,
) -> Graphs:
    """Run dynamo over ``step(*args, **kwargs)``, whose tensors are fakes of ``mode``.

    It ends when a graph holds the whole step. Only after a graph break the step's own code runs,
    on fake tensors.
    """
    graphs = Graphs(look)
    whole = contextlib.suppress(_Whole)
    with whole, on_fakes(mode), without_log():
        found = compilers.compile_apart(step, graphs, dynamic)(*args, **kwargs)
        tensors = (leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor))
        graphs.trains = any(tensor.requires_grad for tensor in tensors)
    return graphs


@contextlib.contextmanager
def on_fakes(mode: FakeTensorMode) -> Iterator[None]:
    """Inside, fake tensors of a mode are what there is, and dynamo remembers nothing of it."""
    quick = dynamo_config.patch(run_gc_after_compile=False)  # the caller's heap may be large
    alone = compilers.own_profile()
    with _disable_current_modes(), mode, alone, quick, quiet_collector(collect_first=False):
        yield


@contextlib.contextmanager
def without_log() -> Iterator[None]:
    """Inside, an op that fails on fake tensors raises, and is not logged as well."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


# --- stand-ins ------------------------------------------------------------------------------


class Fakes:
    """Fake tensors of one mode for the tensors of a step.

    A ``meta`` tensor stands for one of a device: that of the step's other tensors, else torch's
    default one, else the CPU.

    Args:
        tensors: all tensors of the step.
        mode: that of the fakes; a new one if not given.
        device: where all of them are to be, whatever the tensors say; it need not be here.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        mode: FakeTensorMode | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True) if mode is None else mode
        self._moved = device is not None
        self._device = _device_of(tensors) if device is None else device
        self._bases: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        with _disable_current_modes():
            placed = self._moved or tensor.device.type == "meta"
            if not placed or tensor.layout is not torch.strided:
                # Offsets of a nested tensor that has been are noted as such, by the tensor itself,
                # which a mode without open sizes refuses.
                plain = tensor.detach() if was_nested_by(tensor) else tensor
                return self.mode.from_tensor(plain, static_shapes=True)
            parts = is_traceable_wrapper_subclass(tensor)
            found = self._wrapper(tensor) if parts else self._placed(tensor)
        found.requires_grad_(tensor.requires_grad)
        if isinstance(tensor, torch.nn.Parameter):
            found._is_param = True
        return found

    def _wrapper(self, tensor: torch.Tensor) -> torch.Tensor:
        """A subclass (a DTensor) around fake tensors for those that it is around."""
        names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        parts = {name: getattr(tensor, name) for name in names}  # a DTensor's mesh among them
        inner = {
            n: self(part) if isinstance(part, torch.Tensor) else part for n, part in parts.items()
        }
        make = type(tensor).__tensor_unflatten__  # type: ignore[attr-defined]
        found: torch.Tensor = make(inner, context, tensor.size(), tensor.stride())
        return found

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake tensor on the step's device; views share the memory of their base."""
        key = (tensor.untyped_storage()._cdata, tensor.dtype)
        with self.mode, torch.no_grad():
            if key not in self._bases:
                count = tensor.untyped_storage().nbytes() // tensor.element_size()
                self._bases[key] = torch.empty(count, dtype=tensor.dtype, device=self._device)
            base = self._bases[key]
            found = base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            return found.detach()


def _device_of(tensors: Sequence[torch.Tensor]) -> torch.device:
    """The device that ``meta`` tensors stand for; an accelerator goes before the CPU."""
    default = torch.get_default_device()
    devices = [tensor.device for tensor in tensors if tensor.device.type != "meta"]
    accelerators = [device for device in devices if device.type != "cpu"]
    fallback = default if default.type != "meta" else torch.device("cpu")
    return next(iter([*accelerators, *devices]), fallback)
