"""An eager step as arrays: what its simulation reads, made once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from ckpt_pass.planner.eager_parts import EagerOp, EagerRegion, EagerStorage, SavedValue

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


def ints(found: Iterable[int]) -> Ints:
    """An array of whole numbers."""
    return np.array(list(found), dtype=np.int64)


class Table:
    """Ops, storages, values and regions of a step as arrays.

    Args:
        ops, storages, values, candidates: of the step.
    """

    def __init__(
        self,
        ops: Sequence[EagerOp],
        storages: Sequence[EagerStorage],
        values: Sequence[SavedValue],
        candidates: Sequence[EagerRegion],
    ) -> None:
        self.ops, self.values, self.candidates = ops, values, candidates
        self.nbytes = ints(s.nbytes for s in storages)
        self.born = ints(s.born for s in storages)
        self.dies = ints(s.dies for s in storages)
        self.of_graph = np.array([s.of_graph for s in storages], dtype=bool)
        self.shared = np.array([s.shared for s in storages], dtype=bool)
        self.added = np.array([s.added for s in storages], dtype=bool)
        known = [(i, v) for i, v in enumerate(values) if v.storage >= 0]
        self.value_number = ints(i for i, _ in known)
        self.value_storage = ints(v.storage for _, v in known)
        self.released = ints(v.released for _, v in known)
        self.asked = np.array([v.asked for _, v in known], dtype=bool)
        self.workspace = ints(op.workspace_bytes for op in ops)
        self.seconds = np.array([op.time_s for op in ops], dtype=np.float64)
        self.flops = ints(op.flops for op in ops)
        made = [(number, s) for number, op in enumerate(ops) for s in op.makes]
        self.maker, self.makes = ints(op for op, _ in made), ints(s for _, s in made)
        self.regions = Regions(candidates, ops)


class Regions:
    """The candidates as arrays, by their numbers.

    Args:
        regions: the candidates.
        ops: of the step.

    Attributes:
        seconds, flops: of the ops that run again, where nothing is kept.
    """

    def __init__(self, regions: Sequence[EagerRegion], ops: Sequence[EagerOp]) -> None:
        self.first = ints(r.ops[0] for r in regions)
        self.last = ints(r.ops[1] for r in regions)
        self.needed = ints(r.needed for r in regions)
        self.reruns = ints(r.reruns for r in regions)
        self.done = ints([r.done for r in regions] or [0])
        self.extra_bytes = ints(r.extra_bytes for r in regions)
        self.arguments = [ints(r.arguments) for r in regions]
        self.dropped = [ints(r.dropped) for r in regions]
        self.casts = [(ints(s for s, _ in r.casts), ints(o for _, o in r.casts)) for r in regions]
        again = [ops[r.ops[0] : r.ops[0] + r.needed] for r in regions]
        self.seconds = [math.fsum(op.time_s for op in some) for some in again]
        self.flops = [sum(op.flops for op in some) for some in again]
