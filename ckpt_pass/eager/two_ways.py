"""Backwards in a recorded step whose formulas go another way on real tensors, and as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from ckpt_pass._torch import autograd
from ckpt_pass.eager.step_record import EagerTrace, FormulaRecord
from ckpt_pass.graph.formulas import TWO_WAYS
from ckpt_pass.planner.eager_parts import EagerOp, EagerStorage

_Forward = tuple[int, tuple[bool, ...]]


class Formulas:
    """Finds such backwards while a step is recorded.

    Args:
        trace: the record.
    """

    def __init__(self, trace: EagerTrace) -> None:
        self._trace = trace
        self._forwards: dict[int, _Forward] = {}
        self._found: dict[int, FormulaRecord] = {}

    def note(self, op: object, given: Sequence[torch.Tensor]) -> None:
        """Look at the op that begins, from these tensors.

        The formula begins when autograd has taken its saved values, each by a ``detach``: all of
        them are there then.
        """
        index = len(self._trace.ops)
        node = autograd.node_number()
        if node >= 0:
            begins = node in self._found or op is not torch.ops.aten.detach.default
            if begins and autograd.node_name() in TWO_WAYS and node in self._forwards:
                self._ran(node, index)
        elif torch.is_grad_enabled():
            needs = tuple(tensor.requires_grad for tensor in given)
            if any(needs):
                self._forwards.setdefault(autograd.newest_node_number(), (index, needs))

    def _ran(self, node: int, index: int) -> None:
        found = self._found.get(node)
        if found is None:
            forward, needs = self._forwards[node]
            call = self._trace.ops[forward].call
            found = self._found[node] = FormulaRecord(call, needs, (index, index))
            self._trace.formulas.append(found)
        found.ops = (found.ops[0], index + 1)


def replaced(
    ops: Sequence[EagerOp],
    storages: Sequence[EagerStorage],
    most_bytes: Mapping[tuple[int, int], int],
) -> tuple[tuple[EagerOp, ...], tuple[EagerStorage, ...]]:
    """A step in which ranges of ops allocate what was measured of them, at their first op.

    Args:
        ops, storages: of the step.
        most_bytes: what each range needs at the most, with what is left of it afterwards.
    """
    if not most_bytes:
        return tuple(ops), tuple(storages)
    range_of = {index: span for span in most_bytes for index in range(*span)}
    left = dict(most_bytes)
    kept = list(storages)
    for number, storage in enumerate(storages):
        span = range_of.get(storage.born)
        if span is not None:
            outlives = storage.dies > span[1]
            left[span] -= storage.nbytes if outlives else 0
            nbytes = storage.nbytes if outlives else 0
            kept[number] = replace(storage, nbytes=nbytes, born=span[0])
    changed = list(ops)
    for index, span in range_of.items():
        workspace = max(0, left[span]) if index == span[0] else 0
        changed[index] = replace(ops[index], workspace_bytes=workspace)
    return tuple(changed), tuple(kept)
