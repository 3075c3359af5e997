"""Leave a model, its arguments and the random state as they were, whatever ran them.

Whatever runs a model in order to look at it (a trace, a recorded step, a timed one, a comparison)
does so inside :func:`untouched`. Everything that :mod:`ckpt_pass.state.holders` reaches holds the
very same objects afterwards, also when the run failed.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from ckpt_pass._torch import autograd
from ckpt_pass._torch.storages import has_memory
from ckpt_pass.state.elsewhere import Elsewhere
from ckpt_pass.state.holders import Reached, replaced
from ckpt_pass.state.objects import Keeper, SpentIteratorError, keeper_for
from ckpt_pass.state.wrapped import check_wrappers

StandIn = Callable[[torch.Tensor], torch.Tensor]


@contextlib.contextmanager
def untouched(
    *roots: Any,
    stand_in: StandIn | None = None,
    values: bool = False,
    reached: Reached | None = None,
) -> Iterator[tuple[Any, ...]]:
    """Give everything back at the end as it was at the beginning.

    Args:
        roots: models, arguments, and containers of them.
        stand_in: makes what stands in for each tensor inside the ``with`` block: once for each, so
            that tied tensors stay tied.
        values: also give tensors their contents back: for steps on real tensors.
        reached: what is reached from the roots, where that is known already.

    Raises:
        WrapperError: stand-ins would break a module among it.

    Yields:
        The roots; a tensor, or a tuple with tensors, is replaced by its stand-in. Whatever else has
        tensors has their stand-ins while the block runs.
    """
    reached = Reached(roots) if reached is None else reached
    if stand_in is not None:
        check_wrappers(reached.with_code)
    elsewhere = Elsewhere(reached.with_code, reached.is_kept)
    grads = [(tensor, tensor.grad) for tensor in reached.tensors if tensor.is_leaf]
    flags = [(t, t.requires_grad) for t in reached.tensors if t.is_leaf]
    written = [tensor for tensor in reached.tensors if values and _may_change(tensor)]
    copies = [(tensor, tensor.detach().clone()) for tensor in written]
    versions = [-1 if tensor.is_inference() else tensor._version for tensor in written]
    with random_state_restored(), parameters_restored(reached.tensors if values else ()):
        try:
            if stand_in is None and not any(keeper.copy for _, keeper, _ in reached.objects):
                yield roots
            else:
                once = _Once(stand_in)
                for holder in reached.holders:
                    holder.replace(once)
                yield tuple(replaced(root, once) for root in roots)
        finally:
            for holder in reached.holders:
                holder.restore()
            elsewhere.restore()
            for tensor, grad in grads:
                if tensor.grad is not grad:
                    tensor.grad = grad
            for tensor, flag in flags:
                if tensor.requires_grad is not flag:
                    tensor.requires_grad_(flag)
            for tensor, content in copies:
                # Not asked by version: batch normalisation writes its statistics without a trace.
                if not torch.equal(tensor, content):
                    with torch.no_grad():
                        tensor.copy_(content)
            # A step that is under way has saved them, and they are what they were.
            autograd.set_versions([tensor for tensor, _ in copies], versions)
            for thing, keeper, state in reached.objects:
                _set_back(thing, keeper, state)


def _set_back(thing: Any, keeper: Keeper, state: Any) -> None:
    if keeper.same(state, keeper.read(thing)):
        return
    if keeper.write is None:
        raise SpentIteratorError(
            f"A {type(thing).__name__} that the model reads from has moved on while the model was "
            "looked at, and cannot be moved back. Expected state that can: count in an attribute, "
            "or hand values in as arguments."
        )
    keeper.write(thing, state)


@contextlib.contextmanager
def holders_restored(*roots: Any) -> Iterator[None]:
    """Give attributes and containers back what they held; no tensor is copied, nor looked into."""
    reached = Reached(roots)
    try:
        yield
    finally:
        for holder in reached.holders:
            holder.restore()


class _Once:
    """One stand-in for each tensor, with what the user set on it; a copy for each iterator."""

    def __init__(self, stand_in: StandIn | None) -> None:
        self._stand_in = stand_in
        self._made: dict[int, Any] = {}

    def __call__(self, thing: Any) -> Any:
        if isinstance(thing, torch.Tensor):
            return thing if self._stand_in is None else self._tensor(thing, self._stand_in)
        keeper = keeper_for(type(thing))
        if keeper is None or keeper.copy is None:
            return thing
        return self._made.setdefault(id(thing), keeper.copy(thing))

    def _tensor(self, tensor: torch.Tensor, stand_in: StandIn) -> torch.Tensor:
        found: torch.Tensor | None = self._made.get(id(tensor))
        if found is None:
            found = self._made[id(tensor)] = stand_in(tensor)
            given = {} if autograd.is_fake(tensor) else vars(tensor)
            for name, value in given.items():
                vars(found).setdefault(name, value)
        return found


def _may_change(tensor: torch.Tensor) -> bool:
    return not isinstance(tensor, torch.nn.Parameter) and may_be_copied(tensor)


def may_be_copied(tensor: torch.Tensor) -> bool:
    """Whether a tensor has values of its own, and counts how often it is written to."""
    known = tensor.device.type != "meta" and not tensor.is_inference()
    return tensor.layout is torch.strided and known and has_memory(tensor)


@contextlib.contextmanager
def parameters_restored(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Give parameters their values back that a step overwrites.

    ``nn.Embedding(max_norm=...)`` does, and an optimizer that a hook in the backward calls. The
    copies lie on the CPU, whatever the device: nothing of what is measured has room for them.
    """
    plain = [t for t in tensors if type(t) is torch.nn.Parameter and may_be_copied(t)]
    kept = [(t, t._version, t.detach().to("cpu", copy=True)) for t in plain]
    try:
        yield
    finally:
        for tensor, version, values in kept:
            if tensor._version != version:
                with torch.no_grad():
                    tensor.copy_(values)


@contextlib.contextmanager
def random_state_restored() -> Iterator[None]:
    """Give torch's, Python's and numpy's default generators their states back at the end."""
    numpy = sys.modules.get("numpy")
    of_numpy = numpy.random.get_state() if numpy is not None else None
    of_python = random.getstate()
    used = torch.cuda.is_available() and torch.cuda.is_initialized()
    devices = list(range(torch.cuda.device_count())) if used else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(of_python)
            if numpy is not None:
                numpy.random.set_state(of_numpy)
