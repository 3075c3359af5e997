"""Keep in a traced region what it made of tensors that it moves on.

A region under ``torch.compile`` is recomputed by the partitioner, which has values of a graph and
no memory: it makes again what was made of an input from that input, which holds something else by
then if the step has overwritten it. So what reads such a tensor before it moves is saved. Autograd
needs nothing else of it: it refuses a step whose backward reads what was overwritten.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ckpt_pass.regions.actions import is_free, statistics
from ckpt_pass.regions.writes import tensors_in, written


class TracedReads:
    """What ops of a region made of the tensors that were there before it."""

    def __init__(self) -> None:
        self._made: set[int] = set()
        self._moved: set[int] = set()
        self._nodes: dict[int, list[fx.Node]] = {}

    def ran(
        self,
        op: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        nodes: list[fx.Node],
    ) -> None:
        """Note one op, by the nodes that it left; tag what was made of what it overwrites."""
        read = {_memory(tensor) for tensor in tensors_in(args, kwargs)} - self._made - self._moved
        called = [node for node in nodes if node.op == "call_function"]
        kept = [node for node in called if not is_free(node.target)]
        # What a normalisation returns is not made of the statistics that it moves; what others
        # return is made of what they overwrite.
        norm = bool(statistics(op))
        if not norm:
            self._note(read, kept)
        for tensor in written(op, args, kwargs):
            self._move(_memory(tensor))
        if norm:
            self._note(read - self._moved, kept)
        outputs = output if isinstance(output, (list, tuple)) else (output,)
        made = {_memory(tensor) for tensor in outputs if isinstance(tensor, torch.Tensor)}
        self._made |= made - read - self._moved

    def _note(self, read: Iterable[int], nodes: list[fx.Node]) -> None:
        for memory in read:
            self._nodes.setdefault(memory, []).extend(nodes)

    def _move(self, memory: int) -> None:
        if memory in self._made:
            return
        self._moved.add(memory)
        for node in self._nodes.pop(memory, ()):
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _memory(tensor: torch.Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address
