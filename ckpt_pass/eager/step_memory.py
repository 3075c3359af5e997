"""The storages of a step that is recorded: which of them are there, and when each one goes.

Fake tensors hold no memory, but Python's references to their storages are those of the real step:
a storage goes when the last of them does.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from ckpt_pass._torch import functorch
from ckpt_pass.eager.step_record import EagerTrace, StorageRecord
from ckpt_pass.eager.trace_ops import storage_ids
from ckpt_pass.graph.cost import allocated_bytes
from ckpt_pass.policy.sites import output_tensors


class StepMemory:
    """Writes into a trace what storages there are.

    Args:
        trace: where storages are written down, by number.
    """

    def __init__(self, trace: EagerTrace) -> None:
        self._trace = trace
        self._live: dict[int, int] = {}
        self._refs: dict[int, weakref.ref[Any]] = {}

    @property
    def _moment(self) -> int:
        return len(self._trace.ops)

    @property
    def left_bytes(self) -> int:
        """What is still there of the memory that the step has made."""
        return sum(self._trace.storages[number].nbytes for number in self._live.values())

    def left_beside(self, tensors: Iterable[torch.Tensor]) -> tuple[int, ...]:
        """The storages that the step has made and that are still there, less those of some."""
        beside = storage_ids(tensors)
        return tuple(number for key, number in self._live.items() if key not in beside)

    def among(self, keys: Iterable[int]) -> tuple[int, ...]:
        """The storages of the step among some, told apart as ``storage_ids`` does, in order."""
        return tuple(sorted({self._live[key] for key in keys if key in self._live}))

    def number_of(self, tensor: torch.Tensor) -> int:
        """The step's storage behind a tensor; -1 for what existed before."""
        storages = functorch.storages_of(tensor)
        return self.number(storages[0]) if storages else -1

    def number(self, storage: torch.UntypedStorage) -> int:
        """The number of a storage; -1 for what existed before."""
        return self._live.get(storage._cdata, -1)

    def made(self, output: Any, known: set[int], index: int) -> Iterator[int]:
        """Write down what an op has made, and yield the numbers.

        Args:
            output: of the op.
            known: what told the storages apart that were there.
            index: of the op.
        """
        tensors = output_tensors(output)
        pairs = ((tensor, part) for tensor in tensors for part in functorch.storages_of(tensor))
        for tensor, storage in pairs:
            if storage._cdata not in known and storage._cdata not in self._live:
                nbytes = allocated_bytes(storage.nbytes(), tensor.device.type)
                yield self._add(storage, StorageRecord(nbytes, index))

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Memory that Python itself takes and gives back, whoever holds the storage (FSDP)."""
        nbytes = storage.nbytes()
        before = self._live.pop(storage._cdata, None)
        if before is not None:
            known = self._trace.storages[before]
            known.dies, known.resized = self._moment, True
        if nbytes:
            self._add(storage, StorageRecord(nbytes, self._moment, resized=True))

    def beside(self, record: StorageRecord, storage: torch.UntypedStorage) -> None:
        """Write down memory that is real, and goes with a storage."""

        def died(_: Any) -> None:
            record.dies = self._moment

        self._trace.storages.append(record)
        self._refs[len(self._trace.storages) - 1] = weakref.ref(storage, died)

    def held(self, record: StorageRecord) -> Callable[[], None]:
        """Write down what autograd holds unseen; what is returned lets go of it."""
        self._trace.storages.append(record)

        def let_go() -> None:
            record.dies = self._moment

        return let_go

    def _add(self, storage: torch.UntypedStorage, record: StorageRecord) -> int:
        number = len(self._trace.storages)
        self._trace.storages.append(record)
        self._live[storage._cdata] = number
        self._refs[number] = weakref.ref(storage, self._death(storage._cdata, number))
        return number

    def _death(self, key: int, number: int) -> Callable[[Any], None]:
        def died(_: Any) -> None:
            if self._live.get(key) == number:  # it has another size since, and another number
                del self._live[key]
                self._trace.storages[number].dies = self._moment

        return died
