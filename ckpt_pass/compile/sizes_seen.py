"""The sizes at which the functions of a step were compiled.

Dynamo compiles a function for the sizes that it is first called with, and again, with sizes left
open, when others come; from then on calls of the first sizes may run in the newer graph, too. A
plan that was made at a last, smaller batch would not keep to the budget there. So it is made at the
largest sizes that the function was compiled at before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from ckpt_pass._torch import compilers, frames, hints
from ckpt_pass.policy.sites import optimization_hint

_Sizes: TypeAlias = tuple[tuple[int, ...], ...]

#: Shapes of a function that are known: dynamo itself compiles it 8 times, then gives up
#: (``recompile_limit``).
_MOST = 64


class SizesSeen:
    """The sizes of the inputs of each function that a backend has compiled."""

    def __init__(self) -> None:
        self._seen: dict[tuple[frames.Function | None, tuple[str, ...]], list[_Sizes]] = {}

    def take_largest(self, gm: fx.GraphModule) -> None:
        """Have open sizes of a graph taken to be the largest that its function was compiled at.

        Args:
            gm: dynamo's graph; the names of its inputs tell the graphs of a function apart.
        """
        found = [(node, compilers.traced_input(node)) for node in gm.graph.nodes]
        tensors = {node: value for node, value in found if isinstance(value, Tensor)}
        key = frames.compiled_function(), tuple(map(compilers.placeholder_source, tensors))
        now = tuple(tuple(map(optimization_hint, value.shape)) for value in tensors.values())
        seen = self._seen.setdefault(key, [])
        for sizes in sorted(seen, key=_count, reverse=True):
            if _count(sizes) <= _count(now) or _taken([*tensors.values()], sizes):
                break
        if now not in seen and len(seen) < _MOST:
            seen.append(now)


def _count(sizes: _Sizes) -> int:
    return sum(torch.Size(size).numel() for size in sizes)


def _taken(tensors: Sequence[Tensor], sizes: _Sizes) -> bool:
    """Whether a call of some sizes may run in the graph; then its open sizes are taken to be so."""
    if any(tensor.dim() != len(size) for tensor, size in zip(tensors, sizes, strict=True)):
        return False
    pairs: list[tuple[Any, int]] = [
        pair
        for tensor, size in zip(tensors, sizes, strict=True)
        for pair in zip(tensor.shape, size, strict=True)
    ]
    if any(here != there for here, there in pairs if not isinstance(here, torch.SymInt)):
        return False
    return hints.take_sizes([pair for pair in pairs if isinstance(pair[0], torch.SymInt)])
