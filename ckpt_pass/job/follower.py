"""Follow the bytes of code that runs on fake tensors outside of a step's graph."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ckpt_pass._torch import autograd, functorch, optimizers
from ckpt_pass.graph.calls import Calls
from ckpt_pass.graph.cost import allocated_bytes
from ckpt_pass.graph.kernels import WORKSPACE, Kernels, warn_of_unmeasured
from ckpt_pass.graph.reinplace import is_elementwise
from ckpt_pass.graph.watching import Watcher
from ckpt_pass.ops.taxonomy import op_name

#: What a kernel of the CPU's may allocate for two numbers that Python gives it.
NUMBERS_BYTES = 16


@dataclass(frozen=True)
class _Moment:
    """What is there when an op has allocated its outputs, and the op."""

    nbytes: int
    call: fx.Node | None


class Follower(Watcher):
    """Counts the storages of a device that are alive, op by op.

    Single numbers are real, so that code may read and count with them. Where it reads a number
    that is computed from fake tensors, it is told 1; that a condition holds for all of a tensor
    (``isfinite().all()``), and that no other truth value is true (``isnan().any()``).

    Args:
        fakes: the mode of the tensors that are followed.
        device: whose bytes; those of others are not counted.
        kernels: what measures the ops' workspaces.
    """

    def __init__(self, fakes: Any, device: torch.device, kernels: Kernels) -> None:
        super().__init__()
        self._fakes = fakes
        self._device = device
        self._kernels = kernels
        self._calls = Calls(fakes)
        self._live: dict[int, int] = {}
        self._refs: dict[int, Any] = {}
        self._moments: list[_Moment] = []
        self._for_all = WeakIdKeyDictionary()  # truth values that all() has made
        self.live_bytes = 0

    def hold(self, tensors: Iterable[torch.Tensor]) -> int:
        """Count what is there; return how much of it was not counted yet."""
        before = self.live_bytes
        for tensor in (part for whole in tensors for part in _plain_parts(whole)):
            if tensor.device.type == self._device.type:
                for storage in functorch.storages_of(tensor):
                    self._born(storage, tensor.device.type)
        return self.live_bytes - before

    def peak_of(self, part: Callable[[], Any]) -> int:
        """Run a part of a job; return the most bytes while it ran."""
        first = len(self._moments)
        self._moments.append(_Moment(self.live_bytes, None))
        here = self._device.type == "cpu" or torch.cuda.is_available()
        # Without a mode for fake tensors torch looks for a device before anything is dispatched.
        with contextlib.nullcontext() if here else self._fakes, self:
            part()
        moments = self._moments[first:]
        calls = [moment.call for moment in moments if moment.call is not None and here]
        with self._rest():
            facts = self._kernels.facts(list(dict.fromkeys(calls)), WORKSPACE)
        warn_of_unmeasured(self._kernels)
        workspaces = {node: found.workspace_bytes or 0 for node, found in facts.items()}
        return max(
            moment.nbytes + (workspaces.get(moment.call, 0) if moment.call is not None else 0)
            for moment in moments
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._resting or op_name(func).startswith("prim."):
            return func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(map(is_traceable_wrapper_subclass, given)):
            return NotImplemented  # its own code runs ops on what is in it
        if optimizers.reads_a_number(func) and autograd.is_fake(given[0]):
            return self._made_up(given[0])
        output = self._run(func, args, kwargs, given)
        made = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        self.hold(made)
        if op_name(func).startswith("aten.all."):
            self._for_all.update(dict.fromkeys(made, True))
        plain = optimizers.is_fused_or_foreach(func) or _allocates_little(func, (*given, *made))
        call = None if plain else self._node(func, args, kwargs, output)
        numbers = NUMBERS_BYTES if plain and given and self._device.type == "cpu" else 0
        self._moments.append(_Moment(self.live_bytes + numbers, call))
        return output

    def _made_up(self, number: torch.Tensor) -> float | int:
        """What a number that nobody computes is taken to be."""
        if number.dtype is torch.bool:
            return number in self._for_all
        return 1.0 if number.dtype.is_floating_point else 1

    def _run(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[torch.Tensor]
    ) -> Any:
        if any(map(autograd.is_fake, given)):
            return func(*args, **kwargs)
        if given:
            with optimizers.outside_modes():
                return func(*args, **kwargs)
        with self._rest(), self._fakes:
            output = func(*args, **kwargs)
        is_number = isinstance(output, torch.Tensor) and output.numel() <= 1
        if not is_number or output.device.type != "cpu":
            return output
        with optimizers.outside_modes():
            return func(*args, **kwargs)

    def _node(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> fx.Node:
        """The call, whose kernel may allocate besides its outputs."""
        with self._rest():
            return self._calls.node(func, args, kwargs, output)

    def _born(self, storage: Any, device_type: str) -> None:
        key = storage._cdata
        if key in self._live:
            return
        nbytes = allocated_bytes(int(storage.nbytes()), device_type)
        self._live[key] = nbytes
        self.live_bytes += nbytes

        def died(_: Any) -> None:
            self._refs.pop(key, None)
            self.live_bytes -= self._live.pop(key)

        self._refs[key] = weakref.ref(storage, died)


def _allocates_little(func: Any, tensors: Iterable[torch.Tensor]) -> bool:
    """Whether a kernel allocates its outputs, and at most a number that Python gave it."""
    looks = {(t.dtype, t.stride(), t.layout) for t in tensors if t.numel() > 1}
    return is_elementwise(func) and len(looks) <= 1


def _plain_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor, or those that a wrapper of the user's holds."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        part = getattr(tensor, name)
        if isinstance(part, torch.Tensor):  # what is sharded also names its mesh
            yield from _plain_parts(part)
