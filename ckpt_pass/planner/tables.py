"""A problem as arrays, for what follows the storages along a schedule."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckpt_pass.planner.problem import Problem

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Tables:
    """A problem as arrays: sizes, workspaces, and the storages that each op touches."""

    sizes: Ints
    workspace: Ints
    offsets: Ints
    touched: Ints
    makes: NDArray[np.bool_]
    overwrites: NDArray[np.bool_]

    @classmethod
    def of(cls, problem: Problem) -> Tables:
        """The tables of a problem; made once."""
        return problem.derived("tables", cls._build)

    @classmethod
    def _build(cls, problem: Problem) -> Tables:
        counts = [len(op.touches) for op in problem.ops]
        touched = [s for op in problem.ops for s in op.touches]
        makes = [s in op.makes for op in problem.ops for s in op.touches]
        overwrites = [s in op.overwrites for op in problem.ops for s in op.touches]
        return cls(
            sizes=np.array(problem.storage_bytes, dtype=np.int64),
            workspace=np.array([op.workspace_bytes for op in problem.ops], dtype=np.int64),
            offsets=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
            touched=np.array(touched, dtype=np.int64),
            makes=np.array(makes, dtype=bool),
            overwrites=np.array(overwrites, dtype=bool),
        )

    def events(self, order: Ints) -> tuple[Ints, Ints, NDArray[np.bool_], NDArray[np.bool_]]:
        """For each use along a schedule: place, storage, whether it is made, or overwritten."""
        start, stop = self.offsets[order], self.offsets[order + 1]
        counts = stop - start
        place = np.repeat(np.arange(len(order)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        where = np.repeat(start, counts) + within
        return place, self.touched[where], self.makes[where], self.overwrites[where]
