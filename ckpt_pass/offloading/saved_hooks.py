"""Offload what autograd saves for the backward, and recompute nothing: hooks on saved tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ckpt_pass._torch import autograd, storages
from ckpt_pass.offloading.options import Offload
from ckpt_pass.offloading.store import MovedValueChangedError, changed_on_its_way
from ckpt_pass.offloading.stores import OffloadLike, as_offload
from ckpt_pass.offloading.window import AHEAD, Moved, Window

_Fn = TypeVar("_Fn", bound=Callable[..., Any])


def _untraced(fn: _Fn) -> _Fn:
    """What dynamo does not trace: it meets hooks where what it compiles calls what it does not."""
    return cast(
        _Fn, torch.compiler.disable(fn, reason="what autograd saves is offloaded in eager mode")
    )


@dataclass(slots=True)
class _Packed:
    """A saved tensor that is elsewhere, or soon will be.

    Attributes:
        moved: where it is; the tensor itself until it goes.
        version: of the tensor, as it was saved.
        number: how many were put until then.
    """

    moved: Moved | torch.Tensor
    version: int
    number: int = 0


@dataclass(frozen=True, slots=True)
class _Stayed:
    """A saved tensor that stays, and its version: with hooks autograd looks at none itself."""

    tensor: torch.Tensor
    version: int


class SavedHooks:
    """A pair of hooks for autograd.

    What is nobody's activation stays where it is: parameters and their views, leaves that require a
    gradient, and what :meth:`keep` was told of.

    Args:
        window: what puts tensors away.
        numbers: which of the values that autograd saves may go, counted from 0; any where ``None``.
    """

    def __init__(self, window: Window, numbers: Collection[int] | None = None) -> None:
        self._window = window
        self._kept: set[int] = set()
        self._numbers = numbers
        self._seen = 0
        #: What an op has saved that may not have written it yet, and when that was.
        self._waiting: list[_Packed] = []
        self._moment = -1

    def keep(self, values: Any) -> None:
        """Do not move the tensors in there, as long as they live, nor views of them."""
        for value in tree_leaves(values):
            if isinstance(value, torch.Tensor) and self._window.is_worth_moving(value):
                self._kept.add(value.untyped_storage()._cdata)

    @_untraced
    def keep_arguments(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        """The same for a module's arguments: a hook that comes before its forward."""
        self.keep((args, kwargs))

    @_untraced
    def pack(self, tensor: torch.Tensor) -> _Stayed | _Packed:
        """What autograd holds instead of a tensor.

        What has no history may be a buffer that the op fills after autograd has saved it (the noise
        of ``rrelu``). It goes when the next op saves something.
        """
        number = self._seen
        self._seen += 1
        moment = autograd.newest_node_number()
        if self._waiting and moment != self._moment:
            self._put_waiting()
        if not self._goes(number, tensor):
            # Without its history: that would lead back to who holds it.
            held = tensor if tensor.is_leaf else storages.detached(tensor)
            return _Stayed(held, storages.version_of(tensor))
        packed = _Packed(tensor, storages.version_of(tensor))
        if tensor.requires_grad:
            self._put(packed, tensor)
        else:
            self._waiting.append(packed)
            self._moment = moment
        return packed

    def _put(self, packed: _Packed, tensor: torch.Tensor) -> None:
        packed.moved, packed.number = self._window.put(tensor), self._window.count

    def _put_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for packed in waiting:
            tensor = packed.moved
            if isinstance(tensor, torch.Tensor) and not _changed(packed, tensor):
                self._put(packed, tensor)

    @_untraced
    def unpack(self, packed: _Stayed | _Packed) -> torch.Tensor:
        """The tensor, as it was.

        Raises:
            MovedValueChangedError: it was changed in place, as a plain step refuses, too.
        """
        if isinstance(packed, _Stayed):
            return self._unchanged(packed)
        if isinstance(packed.moved, torch.Tensor):
            if _changed(packed, packed.moved):
                raise changed_on_its_way(packed.moved.shape, packed.moved.dtype)
            return packed.moved
        tensor = packed.moved.take(shared=True)
        self._window.fetch_earlier(packed.number)
        return tensor

    def _unchanged(self, packed: _Stayed) -> torch.Tensor:
        tensor, version = packed.tensor, storages.version_of(packed.tensor)
        if version != packed.version:
            raise MovedValueChangedError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: a tensor of shape {list(tensor.shape)} and {tensor.dtype} is "
                f"at version {version}, expected version {packed.version}, at which autograd saved "
                "it. Clone it before the in-place op."
            )
        return tensor

    def _goes(self, number: int, tensor: torch.Tensor) -> bool:
        if self._numbers is not None and number not in self._numbers:
            return False
        base = tensor if tensor._base is None else tensor._base
        if isinstance(base, nn.Parameter) or (base.is_leaf and base.requires_grad):
            return False
        if not self._window.is_worth_moving(tensor):
            return False
        return tensor.untyped_storage()._cdata not in self._kept

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """What autograd saves inside, on this thread, is offloaded."""
        autograd.push_saved_hooks(self.pack, self.unpack)
        try:
            yield
            self._put_waiting()
        finally:
            self._waiting.clear()
            autograd.pop_saved_hooks()


def _changed(packed: _Packed, tensor: torch.Tensor) -> bool:
    return storages.version_of(tensor) != packed.version


def offload_activations(
    model: nn.Module | None = None,
    offload: OffloadLike | bool | None = None,
    *,
    in_flight: int = Offload.IN_FLIGHT,
) -> contextlib.AbstractContextManager[None]:
    """Offload what autograd saves inside the ``with`` block; run the forward in it.

    As TRL's and torchtune's ``OffloadActivations``. Nothing is recomputed. A saved tensor's whole
    storage is moved, once, whoever shares it, and comes back with size and stride; the next are
    fetched ahead. The last ``in_flight`` values stay where they are: the backward begins with them.
    Inside a function that ``torch.compile`` compiles, dynamo cuts the graph at the block.

    Args:
        model: its parameters, buffers and inputs stay. Without it inputs that require no gradient
            are taken for activations, and moved to no avail.
        offload: where values go; to the host where ``None`` or ``True``.
            ``Offload(min_bytes=...)`` says from which size on.
        in_flight: how many values may be on their way at once; with 0 every one is waited for.

    Raises:
        InvalidOffloadError: ``offload`` is no place.
        StoreFullError: a value does not fit.
        StoreWriteError: a value could not be written.
        StoreReadError, MovedValueChangedError: come in the backward.
    """
    return _Offloaded(model, as_offload(offload), in_flight)


@contextlib.contextmanager
def _offloaded(
    model: nn.Module | None, offload: OffloadLike | None, in_flight: int
) -> Iterator[None]:
    window = Window(Offload() if offload is None else offload, in_flight=in_flight, last_first=True)
    hooks = SavedHooks(window)
    handle = None
    if model is not None:
        hooks.keep([*model.parameters(), *model.buffers()])
        handle = model.register_forward_pre_hook(hooks.keep_arguments, with_kwargs=True)
    try:
        with hooks.active():
            yield
    finally:
        window.forget()
        if handle is not None:
            handle.remove()


class _Offloaded(contextlib.ContextDecorator, contextlib.AbstractContextManager[None]):
    """A block of :func:`offload_activations`, of which dynamo traces nothing."""

    def __init__(
        self, model: nn.Module | None, offload: OffloadLike | None, in_flight: int
    ) -> None:
        self._options = model, offload, in_flight
        self._blocks: list[contextlib.AbstractContextManager[None]] = []

    @_untraced
    def __enter__(self) -> None:
        block = _offloaded(*self._options)
        block.__enter__()
        self._blocks.append(block)

    @_untraced
    def __exit__(self, *exc: Any) -> bool | None:
        return self._blocks.pop().__exit__(*exc)


@contextlib.contextmanager
def offloaded_inside(
    module: Any,
    arguments: Any,
    offload: OffloadLike | None,
    numbers: Collection[int] | None = None,
    ahead: int = AHEAD,
) -> Iterator[None]:
    """The same for one module among others: at its end all of its values are gone.

    Args:
        module: what runs; parameters and buffers stay, if it is a module.
        arguments: what it is called with. Those without a history stay.
        offload: where values go; to the host where ``None``.
        numbers: which of the values that autograd saves inside may go, counted from 0; any where
            ``None``.
        ahead: how many are fetched before they are needed.

    Raises:
        StoreFullError, StoreWriteError: see :func:`offload_activations`.
    """
    where = Offload() if offload is None else offload
    window = Window(where, ahead=ahead, last_first=True)
    hooks = SavedHooks(window, numbers)
    if numbers is None:  # else whoever chose them knows
        if isinstance(module, nn.Module):
            hooks.keep(list(module.buffers()))
        given = tree_leaves(arguments)
        hooks.keep([t for t in given if isinstance(t, torch.Tensor) and t.is_leaf])
    with hooks.active():
        yield
    window.finish()
