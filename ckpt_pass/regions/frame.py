"""One run of an eager checkpoint region: its forward now, its recomputation when backward asks.

Autograd's saved values go through a pair of hooks (``torch.autograd.graph.saved_tensors_hooks``),
as in ``torch.utils.checkpoint`` without reentrance: the forward keeps a number for each, the first
one that the backward asks for makes the region run again, which fills them all in. What torch does
besides and a region rarely needs is left out or made cheap: the random state is kept only where
random numbers were drawn, arguments are kept by reference unless hooks are active around the
region, a saved value is described by its looks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.profiler import record_function
from torch.utils._pytree import tree_flatten, tree_unflatten

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch import autograd, functorch, modules
from ckpt_pass.regions.ambient import Ambient, RandomState, accelerators, drawing_from
from ckpt_pass.regions.saved_values import Recomputation, SavedLooks

Contexts = tuple[
    contextlib.AbstractContextManager[Any] | None, contextlib.AbstractContextManager[Any] | None
]


class MutatedArgumentError(CkptPassError, RuntimeError):
    """An argument was changed in place before its recomputation; autograd: ``RuntimeError``."""


@dataclass(frozen=True)
class RegionOptions:
    """How a region runs.

    Attributes:
        name: for messages and for profilers.
        contexts: makes the modes around its forward and around its recomputation; either may be
            ``None``.
        traced: makes them where the region is traced under ``torch.compile``.
        draws: whether it draws random numbers; ``None`` to find out, run by run.
        stops_early: whether its recomputation ends with the last value that the backward needs.
        checked: whether recomputed values must look like those of the forward.
    """

    name: str = "region"
    contexts: Callable[[], Contexts] | None = None
    traced: Callable[[], Any] | None = None
    draws: bool | None = None
    stops_early: bool = True
    checked: bool = True


class _Complete(BaseException):
    """Ends a recomputation that has made all that the backward needs.

    Not an ``Exception``: a region's own ``except Exception`` must let it through.
    """


class _CompleteAmongHooks(Exception):
    """The same, among hooks of modules that are to be called always.

    ``nn.Module`` calls them for an ``Exception`` alone, as torch's early stop is. A region that
    catches it runs on, and what it saves from there on is let go.
    """


class Frame:
    """The state of one run of a region; lives as long as autograd holds one of its values."""

    __slots__ = (
        "__weakref__",
        "_ambient",
        "_arguments",
        "_complete",
        "_contexts",
        "_fn",
        "_options",
        "_random",
        "_saved",
        "_stops_early",
        "_store",
    )

    def __init__(self, fn: Callable[..., Any], options: RegionOptions) -> None:
        self._fn = fn
        self._options = options
        self._saved = SavedLooks()
        self._stops_early = autograd.stops_early(options.stops_early)
        self._store: list[torch.Tensor | None] = []
        self._complete = False
        self._random: RandomState | None = None
        self._contexts: Contexts = (None, None)

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the region; what autograd saves inside is not kept."""
        options = self._options
        self._arguments = self._kept(args, kwargs)
        devices = self._arguments.devices
        self._ambient = Ambient.now(devices)
        before = None if options.draws is False else RandomState.now(devices)
        self._random = before  # for a backward inside the region
        if options.contexts is None:
            output = self._run(args, kwargs)
        else:
            self._contexts = options.contexts()
            with self._contexts[0] or contextlib.nullcontext():
                output = self._run(args, kwargs)
        if before is not None and not options.draws:
            self._random = before if before.differs(RandomState.now(devices)) else None
        self._complete = True
        self._store = []  # what a backward inside the region had made and left
        return output

    def _kept(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        return Arguments(args, kwargs, self._options.name)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        autograd.push_saved_hooks(self._saved.pack, self._unpack)
        try:
            return self._fn(*args, **kwargs)
        finally:
            autograd.pop_saved_hooks()

    def _unpack(self, number: int) -> torch.Tensor:
        value = self._store[number] if number < len(self._store) else None
        if value is None:  # not yet recomputed, or used by a backward before this one
            self._fill()
            value = self._store[number]
            assert value is not None
        self._store[number] = None
        return value

    def _fill(self) -> None:
        """Make the values that autograd saved again."""
        args, kwargs = self._arguments.again()
        self._rerun(args, kwargs)

    def _rerun(self, args: tuple[Any, ...], kwargs: dict[str, Any], to_end: bool = False) -> Any:
        """Run the region again and hold what autograd saves, in order.

        Args:
            args, kwargs: as the forward got them.
            to_end: also run what nothing that is saved needs.

        Returns:
            The region's output; ``None`` if it was not run to its end.
        """
        complete = _stop if self._stops_early and not to_end else _go_on
        self._store = []
        rerun = Recomputation(
            self._options.name, self._saved.looks, complete, self._options.checked
        )
        was_enabled = torch.is_grad_enabled()
        output = None
        with contextlib.ExitStack() as stack:
            if functorch.profiler_is_running():
                stack.enter_context(record_function(f"recompute {self._options.name}"))
            self._ambient.restore(stack)
            if self._random is not None:
                stack.enter_context(drawing_from(self._random))
            if self._contexts[1] is not None:
                stack.enter_context(self._contexts[1])
            autograd.set_grad_enabled(True)
            autograd.push_saved_hooks(rerun.pack, rerun.unpack)
            try:
                output = self._fn(*args, **kwargs)
            except (_Complete, _CompleteAmongHooks):
                pass
            finally:
                autograd.pop_saved_hooks()
                autograd.set_grad_enabled(was_enabled)
                made = rerun.handed_over()
        rerun.check_count(exactly=self._complete and not self._stops_early)
        self._store = made
        return output


def _stop() -> None:
    if modules.hooks_wait_for_errors(until=Frame._rerun.__code__):
        raise _CompleteAmongHooks
    raise _Complete


def _go_on() -> None:
    pass


def _tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among values and in the lists, tuples and dicts among them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors_in(value)
        elif isinstance(value, dict):
            yield from _tensors_in(value.values())


class Arguments:
    """A region's arguments, kept for its recomputation.

    Without saved-tensor hooks around the region they are kept as they are, and their versions tell
    whether somebody changed them. With hooks (an outer checkpoint region, offloading to the CPU),
    these decide how tensors are kept, as for any value that autograd saves.
    """

    __slots__ = ("_args", "_flat", "_kwargs", "_name", "_unpack", "_versions", "devices")

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> None:
        self._name = name
        self._unpack: autograd.UnpackHook | None = None
        tensors = list(_tensors_in((*args, *kwargs.values())))
        self.devices = accelerators(tensors)
        self._args, self._kwargs = args, kwargs
        self._versions: list[tuple[torch.Tensor, int]] | None = None
        hooks = autograd.saved_hooks()
        if hooks is None:
            self._versions = [(t, t._version) for t in tensors if not t.is_inference()]
        else:
            self._pack_with(hooks)

    def _pack_with(self, hooks: tuple[Any, Any]) -> None:
        pack, self._unpack = hooks
        flat, spec = tree_flatten((self._args, self._kwargs))
        with torch.no_grad():
            self._flat = (
                [
                    (pack(value), value.requires_grad) if isinstance(value, torch.Tensor) else value
                    for value in flat
                ],
                [isinstance(value, torch.Tensor) for value in flat],
                spec,
            )
        self._args, self._kwargs = (), {}

    def again(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as the forward got them.

        Raises:
            MutatedArgumentError: one was changed in place in the meantime.
        """
        if self._unpack is not None:
            return self._unpacked()
        for tensor, version in self._versions or ():
            if tensor._version != version:
                raise MutatedArgumentError(
                    f"An argument of {self._name} (shape {list(tensor.shape)}) was changed in "
                    f"place {tensor._version - version} times after the region's forward began, "
                    "so it cannot be recomputed. Clone the argument before the in-place op, or "
                    "take the op out of the region."
                )
        return self._args, self._kwargs

    def _unpacked(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        assert self._unpack is not None
        packed, is_tensor, spec = self._flat
        flat = []
        for value, tensor in zip(packed, is_tensor, strict=True):
            if not tensor:
                flat.append(value)
                continue
            held, requires_grad = value
            found = self._unpack(held).detach()
            flat.append(found.requires_grad_() if requires_grad else found)
        args, kwargs = tree_unflatten(flat, spec)
        return args, kwargs
