"""Torch's autograd internals that regions need."""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
)
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

#: Raised by fake tensors that were asked for a value, or for a size that depends on values.
NO_VALUES = (DataDependentOutputException, DynamicOutputShapeException)

PackHook = Callable[[torch.Tensor], Any]
UnpackHook = Callable[[Any], torch.Tensor]

#: How torch's checkpoint region keeps a tensor among its arguments.
_SAVED = frozenset((torch._C._autograd.SavedTensor, type(None)))

#: Put a pair of hooks on the values that autograd saves from now on, on this thread. The context
#: manager of ``torch.autograd.graph`` does no more, but takes a microsecond longer.
push_saved_hooks: Callable[[PackHook, UnpackHook], None] = (
    torch._C._autograd._push_saved_tensors_default_hooks
)
#: Take the newest pair away again.
pop_saved_hooks: Callable[[], None] = torch._C._autograd._pop_saved_tensors_default_hooks
#: ``torch.set_grad_enabled`` without its context manager.
set_grad_enabled: Callable[[bool], None] = torch._C._set_grad_enabled
#: Whether hooks on saved values are allowed now.
hooks_enabled: Callable[[], bool] = torch._C._autograd._saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]
#: Whether ``torch.func`` is transforming what runs now.
transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active


def keeps_graph() -> bool:
    """Whether the backward that runs leaves what was saved for another one."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def forward_derivatives_active() -> bool:
    """Whether a level of ``torch.autograd.forward_ad`` is open."""
    return forward_ad._current_level >= 0


#: The function below the engine's, and the modules of those that torch puts around a dispatch.
_RUN_BACKWARD = torch.autograd.graph._engine_run_backward.__code__
_BETWEEN = frozenset(("torch._compile", "torch._dynamo.eval_frame"))

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


@contextlib.contextmanager
def without_accumulated_hooks(leaves: Iterable[torch.Tensor]) -> Iterator[None]:
    """Inside, nobody is told that a leaf has its gradient: an optimizer in the backward, say."""
    found = [leaf._post_accumulate_grad_hooks for leaf in leaves]
    kept = [(hooks, dict(hooks)) for hooks in found if hooks]
    for hooks, _ in kept:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in kept:
            hooks.update(before)


def saved_hooks() -> tuple[PackHook, UnpackHook] | None:
    """The hooks that autograd would call now for a value that it saves; ``None`` without any."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def frame_of_checkpoint(pack: Any) -> Any:
    """The frame of torch's checkpoint region whose forward uses this hook; ``None`` if none does.

    It is what the hook closes over (``torch.utils.checkpoint._checkpoint_hook``).
    """
    code = getattr(pack, "__code__", None)
    if code is None or not pack.__qualname__.startswith("_checkpoint_hook."):
        return None
    return _closed_over(pack, "frame")


def without_history(value: torch.Tensor) -> torch.Tensor:
    """An alias of ``value`` that leads to no graph; ``value`` itself where it does not, a leaf.

    Modes of dispatch do not see it made of a plain tensor: a trip into Python for each saved value
    would cost more than all else that is done with it.
    """
    if not value.requires_grad or value.is_leaf:
        return value
    return data_of(value)


class _Made(torch.autograd.Function):
    """What makes a tensor that no op has made."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        """The same memory; unlike a view it may be changed in place."""
        return value.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Never asked for."""
        return gradient


_made: Callable[[torch.Tensor], torch.Tensor] = _Made.apply


def with_history(value: torch.Tensor) -> torch.Tensor:
    """An alias that requires a gradient and is no leaf, as results of ops are.

    What sees a leaf may take it for a weight: autocast keeps its cast, an in-place op refuses it.
    """
    with torch.enable_grad():
        return _made(value.detach().requires_grad_())


def without_histories(values: list[torch.Tensor]) -> list[torch.Tensor | None]:
    """The same of several."""
    if torch._C._len_torch_dispatch_stack():
        return list(map(without_history, values))
    return [v.data if v.requires_grad and not v.is_leaf else v for v in values]


def data_of(value: torch.Tensor) -> torch.Tensor:
    """An alias of the memory that ``value`` looks at now; modes of dispatch do not see it made."""
    if torch._C._len_torch_dispatch_stack() and type(value) in _PLAIN:
        with torch._C._DisableTorchDispatch():
            return value.data
    return value.data


_data: Callable[[torch.Tensor], torch.Tensor] = operator.attrgetter("data")


def data_of_all(values: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same of several plain tensors."""
    if torch._C._len_torch_dispatch_stack():
        with torch._C._DisableTorchDispatch():
            return list(map(_data, values))
    return list(map(_data, values))


def _closed_over(fn: Any, name: str) -> Any:
    names = fn.__code__.co_freevars
    return fn.__closure__[names.index(name)].cell_contents if name in names else None


def function_of_checkpoint(frame: Any) -> Any:
    """The function that a region of torch's checkpoint runs.

    Torch's frame keeps a closure over it (``_checkpoint_without_reentrant_generator``).
    """
    return _closed_over(frame.recompute_fn, "fn")


def _kept_arguments(frame: Any) -> tuple[list[Any], dict[str, Any]]:
    """What torch's checkpoint region keeps of its arguments: by position, and by name.

    Tensors by position are kept apart. Torch 2.13 has a list of the frame's own, and a dict that
    its function closes over; before, both are in a list that an autograd node's function closes
    over, behind a dummy (``_NoopSaveInputs``).
    """
    if hasattr(frame, "saved_args"):
        return frame.saved_args, _closed_over(frame.recompute_fn, "kwargs") or {}
    node = frame.input_saver.grad_fn
    _dummy, named, *positional = _closed_over(node.get_args, "args") if node else (None, {})
    return positional, named


def arguments_of_checkpoint(frame: Any) -> list[Any]:
    """What torch's checkpoint region keeps of its arguments, tensors excepted."""
    positional, named = _kept_arguments(frame)
    return [value for value in positional if type(value) not in _SAVED] + list(named.values())


def convert_arguments(frame: Any, convert: Callable[[Any], Any]) -> None:
    """Change what torch's checkpoint region keeps of its arguments, tensors excepted."""
    positional, named = _kept_arguments(frame)
    positional = [value if type(value) in _SAVED else convert(value) for value in positional]
    named = {key: convert(value) for key, value in named.items()}
    if not hasattr(frame, "saved_args"):
        if frame.input_saver.grad_fn is not None:
            _closed_over(frame.input_saver.grad_fn.get_args, "args")[1:] = [named, *positional]
        return
    frame.saved_args = positional
    names, closure = frame.recompute_fn.__code__.co_freevars, frame.recompute_fn.__closure__
    if "kwargs" in names:
        closure[names.index("kwargs")].cell_contents = named


def recompute_anew(frame: Any) -> None:
    """Let torch's checkpoint region recompute once more in the backward that runs now.

    It does so once a backward and hands each value out once (``_CheckpointFrame``). A value may be
    asked for again, though: by a backward inside this one, or by a function that looks at its saved
    tensors twice.
    """
    if not (frame.recomp_counter or frame.is_recomputed or frame.recomputed):
        return  # the first time
    group = torch._C._get_graph_exec_group()
    task = torch._C._current_graph_task_id() if group is None else group
    for known in (frame.is_recomputed, frame.recomp_counter, frame.recomputed):
        known.pop(task, None)


def set_versions(tensors: Sequence[torch.Tensor], versions: Sequence[int]) -> None:
    """Give tensors, whose contents are what they were then, the versions that they had.

    Those of inference tensors, which have none, are passed over.
    """
    for tensor, version in zip(tensors, versions, strict=True):
        if not tensor.is_inference() and tensor._version != version:
            torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))


def early_stop_asked() -> bool | None:
    """What ``set_checkpoint_early_stop`` says of all regions; ``None`` where it says nothing."""
    return torch.utils.checkpoint._enable_checkpoint_early_stop


def debugs(wanted: bool) -> bool:
    """Whether regions log their ops: what ``set_checkpoint_debug_enabled`` says, else as wanted."""
    enabled = torch.utils.checkpoint._checkpoint_debug_enabled
    return wanted if enabled is None else enabled


def storage_holders(storage: torch.UntypedStorage) -> int:
    """How many tensors (and others) share a storage, the Python object itself not counted."""
    return int(torch._C._storage_Use_Count(storage._cdata))


def is_held_alone(gradient: torch.Tensor) -> bool:
    """Whether the engine, which adds to a gradient, is the only one to hold it.

    To be asked in a ``__torch_dispatch__`` that sees the sum.
    """
    alone = storage_holders(gradient.untyped_storage()) == 2
    return alone and gradient._use_count() == uses_when_alone()  # type: ignore[attr-defined]


@functools.cache
def uses_when_alone() -> int:
    """What torch counts of a gradient that the engine alone holds, as a dispatch mode sees it.

    A sum in the backward of a function of two uses tells; other versions of torch may count
    otherwise. To be asked outside of every ``__torch_dispatch__``, in which it is another.
    """
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten.add.Tensor:
                seen.append(args[0]._use_count())
            return func(*args, **(kwargs or {}))

    with _disable_current_modes(), torch.enable_grad(), torch.inference_mode(False):
        value = torch.ones(2, requires_grad=True) * 1
        result = (value.sin() * value.cos()).sum()
        with Watch():  # type: ignore[no-untyped-call]
            result.backward()
    (found,) = seen
    return int(found)


def called_by_engine() -> bool:
    """Whether the op that a ``__torch_dispatch__`` sees was called by autograd's engine, in C++.

    Or by one of its formulas; not by Python code that the engine runs: a hook, or the backward of a
    function of its own. On a thread of the engine's no frames lie below.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_name != "__torch_dispatch__":
        frame = frame.f_back
    frame = frame.f_back if frame is not None else None
    while frame is not None and frame.f_globals.get("__name__") in _BETWEEN:
        frame = frame.f_back
    return frame is None or frame.f_code is _RUN_BACKWARD


def accumulates() -> bool:
    """Whether what runs now was called by the node that fills a leaf's ``.grad``."""
    node = torch._C._current_autograd_node()
    return node is not None and node.name().endswith("AccumulateGrad") and called_by_engine()


def node_number() -> int:
    """A number of the graph's node whose backward runs now; -1 where none does.

    Also while the engine adds what that node gave to what is there.
    """
    node = torch._C._current_autograd_node()
    return -1 if node is None else int(node._sequence_nr())


def node_name() -> str:
    """The name of the node of the graph whose backward runs now; empty where none does."""
    node = torch._C._current_autograd_node()
    return "" if node is None else str(node.name())


def newest_node_number() -> int:
    """The number of the node that was made last on this thread (:func:`node_number`)."""
    return int(torch._C._autograd._get_sequence_nr()) - 1


def formula_of(results: Sequence[torch.Tensor]) -> tuple[Any, list[torch.Tensor | None]]:
    """The backward of one op's results: what runs it without the engine, and gradients for it."""
    node: Any = results[0].grad_fn
    gradients: list[torch.Tensor | None] = [None] * len(node._input_metadata)
    for result in results:
        gradients[result.output_nr] = torch.rand_like(result.detach())
    return node, gradients


def node_leads_twice() -> bool:
    """Whether the node whose backward runs now gives two gradients for one value."""
    node = torch._C._current_autograd_node()
    edges = [] if node is None else [edge for edge in node.next_functions if edge[0] is not None]
    return len(set(edges)) < len(edges)


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a fake one."""
    return isinstance(tensor, FakeTensor)


def is_distributed(value: Any) -> bool:
    """Whether a value is a DTensor (``torch.distributed.tensor``, which is not imported here)."""
    return type(value).__name__ == "DTensor"


#: Marks of FSDP1 and of DeepSpeed's third stage on parameters, whose memory they give and take.
_GATHERED = ("_fsdp_flattened", "ds_id")


def is_gathered(tensor: torch.Tensor) -> bool:
    """Whether a parameter has its memory from sharded training, for a while, ever anew."""
    own = tensor.__dict__
    return bool(own) and any(mark in own for mark in _GATHERED)
