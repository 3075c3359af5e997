"""The bytes that a step holds as it runs on fake tensors: storages, from birth to death.

Each value is held by whom it is held on the real run, and a storage is gone when nothing holds it
any more. What kernels allocate besides is measured (:mod:`ckpt_pass.graph.kernels`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef

from ckpt_pass._torch import functorch
from ckpt_pass.graph.calls import Calls
from ckpt_pass.graph.cost import as_bytes
from ckpt_pass.graph.kernel_cache import KernelFacts
from ckpt_pass.graph.kernel_ops import is_computing
from ckpt_pass.graph.kernels import WORKSPACE, Kernels
from ckpt_pass.offloading.graph_ops import FETCH, PUT, fetched_memory
from ckpt_pass.ops.taxonomy import is_sized_by_values
from ckpt_pass.planner.caching_allocator import Lifetime, added_up, handed_out
from ckpt_pass.policy.sites import Bytes, optimization_hint, output_tensors

Looks: TypeAlias = Callable[[fx.Node, Any, set[int]], Any]
"""``looks(call, result, given)``: the result, looking as a kernel's; ``given`` are the storages
that were there before."""


@dataclass(frozen=True)
class Curve:
    """Bytes over a step.

    Attributes:
        bytes_at: the most bytes while each op runs, workspaces among them.
        where: each op, in words.
    """

    bytes_at: tuple[int, ...]
    where: tuple[str, ...]

    def most(self, start: int = 0, end: int | None = None) -> int:
        """The most bytes between two moments."""
        return max(self.bytes_at[start:end], default=0)

    @property
    def peak_at(self) -> str:
        """The op at the peak; empty for a step without ops."""
        return self.where[self.bytes_at.index(self.most())] if self.bytes_at else ""


class _Storage:
    """A storage of the step: its size, and the moments at which it was there."""

    __slots__ = ("born", "died", "index", "maker", "nbytes", "reference", "size")

    def __init__(self, reference: StorageWeakRef | None, nbytes: Any, born: int) -> None:
        self.reference = reference
        self.nbytes = optimization_hint(nbytes)
        #: The same, with sizes that are symbolic.
        self.size = as_bytes(nbytes)
        self.born = born
        self.died: int | None = None
        #: The call that made it, and which of its outputs it is behind.
        self.maker: fx.Node | None = None
        self.index = 0

    @property
    def is_gone(self) -> bool:
        """Whether nothing holds it any more."""
        return self.reference is not None and self.reference.expired()


class HeldBytes:
    """Counts the storages that ops make.

    Args:
        fake: the mode of the fake tensors.
        device_type: the device whose memory counts.
        calls: whether calls are written down, for what kernels allocate besides. Their sizes are
            no symbols then.
    """

    def __init__(
        self, fake: functorch.FakeTensorMode, device_type: str, calls: bool = True
    ) -> None:
        self._device_type = device_type
        self._writes_calls = calls
        self._alive: dict[int, _Storage] = {}
        self._storages: list[_Storage] = []
        self._where: list[str] = []
        self._calls = Calls(fake)
        #: The calls that may have a workspace, by the moment at which they ran.
        self._called: dict[int, fx.Node] = {}

    @property
    def moment(self) -> int:
        """How many ops have run."""
        return len(self._where)

    @property
    def alive_bytes(self) -> int:
        """The bytes that are held now."""
        self._let_go()
        return sum(storage.nbytes for storage in self._alive.values())

    def note(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Any,
        where: str,
        looks: Looks | None = None,
    ) -> Any:
        """An op has run.

        Args:
            func, args, kwargs, result: the call, and what it returned.
            where: the op, in words.
            looks: makes the result look as the kernel's, if that matters to what follows.

        Returns:
            The result.
        """
        given = given_storages(args, kwargs)
        self._let_go()
        written = self._writes_calls and is_computing(func)
        node = self._calls.node(func, args, kwargs, result) if written else None
        if looks is not None and node is not None:
            found = looks(node, result, given)
            if found is not result:
                result = found
                self._calls.returns(node, result)
        made = output_tensors(fetched_memory(args[0]) if func is FETCH else result)
        for index, tensor in enumerate(made):
            own = func is not PUT and tensor.untyped_storage()._cdata not in given
            if own and _lies(tensor):  # a ticket is not the allocator's memory
                self._add(tensor, node, index)
        if node is not None:
            self._calls.note_outputs(node, result)
            self._called[self.moment] = node
        self._where.append(where)
        return result

    def hold(self, nbytes: int) -> Callable[[], None]:
        """Bytes that the op which runs next leaves behind, to the end if not let go before.

        Returns:
            What lets them go.
        """
        held = _Storage(None, nbytes, self.moment)
        self._storages.append(held)

        def let_go() -> None:
            held.died = self.moment

        return let_go

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Python itself has taken a storage's memory, or given it back, whoever holds it (FSDP)."""
        self._let_go()
        before = self._alive.pop(storage._cdata, None)
        if before is not None:
            before.died = self.moment
        if storage.nbytes():
            self._begin(storage)

    def _let_go(self) -> None:
        gone = [key for key, storage in self._alive.items() if storage.is_gone]
        for key in gone:
            self._alive.pop(key).died = self.moment

    def _add(self, tensor: Tensor, node: fx.Node | None, index: int) -> None:
        storage = tensor.untyped_storage()
        if tensor.device.type != self._device_type or storage._cdata in self._alive:
            return
        made = self._begin(storage)
        made.maker, made.index = node, index

    def _begin(self, storage: torch.UntypedStorage) -> _Storage:
        made = _Storage(StorageWeakRef(storage), storage.nbytes(), self.moment)
        self._alive[storage._cdata] = made
        self._storages.append(made)
        return made

    def curve(self) -> Curve:
        """The bytes over what has run, workspaces of the kernels among them."""
        self._let_go()
        facts = Kernels().facts([*dict.fromkeys(self._called.values())], WORKSPACE)
        found = {moment: facts.get(node) for moment, node in self._called.items()}
        workspaces = {m: one.workspace_bytes or 0 for m, one in found.items() if one is not None}
        lifetimes = [
            Lifetime(
                storage.born,
                self.moment if storage.died is None else storage.died,
                self._nbytes(storage, facts),
            )
            for storage in self._storages
        ]
        if self._device_type == "cpu":
            bytes_at = added_up(lifetimes, workspaces, self.moment)
        else:
            bytes_at = handed_out(lifetimes, workspaces, self.moment)
        return Curve(tuple(bytes_at), tuple(self._where))

    def open_lifetimes(self) -> tuple[tuple[int, int, Bytes], ...]:
        """Of each storage when it is made, when it is gone, and its bytes at every size."""
        self._let_go()
        return tuple(
            (one.born, self.moment if one.died is None else one.died, one.size)
            for one in self._storages
        )

    @staticmethod
    def _nbytes(storage: _Storage, facts: Mapping[fx.Node, KernelFacts]) -> int:
        maker = storage.maker
        if maker is None or is_sized_by_values(maker.target):
            return storage.nbytes
        found = facts.get(maker)
        if found is not None and found.outputs and storage.index < len(found.outputs):
            real = found.outputs[storage.index].storage_bytes
            return storage.nbytes if real is None else real
        return storage.nbytes


def given_storages(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> set[int]:
    """What tells the storages apart that an op is given."""
    passed = (*output_tensors(args), *output_tensors(tuple(kwargs.values())))
    return {tensor.untyped_storage()._cdata for tensor in passed if _lies(tensor)}


def _lies(tensor: Tensor) -> bool:
    """Whether a tensor has a storage that can be counted."""
    return tensor.layout is torch.strided


def device_type_of(tensors: Any) -> str:
    """The device whose memory counts: an accelerator's where a step uses one."""
    found = {tensor.device.type for tensor in tensors}
    return next((kind for kind in sorted(found) if kind not in ("cpu", "meta")), "cpu")
