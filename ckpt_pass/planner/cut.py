"""The time-optimal cut: least recompute time + price x saved bytes, chains included, exactly.

torch's partitioner gives an op that it will not recompute infinite capacity from the source; here
every op has its recompute *time* instead, and its save edge ``price * bytes``. One minimum cut
then decides all ops at once (the classic project-selection form; torch: ``solve_min_cut``).
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from ckpt_pass.planner.problem import Problem, needed_by

# scipy's maximum_flow works on 32-bit integers: finite capacities add up to at most this ...
_TOTAL = 1 << 29
# ... and this is more than all of them together.
_INFINITE = 1 << 30


def read_by_backward(problem: Problem) -> frozenset[int]:
    """Forward ops whose results the backward's own ops take directly."""
    ops = problem.ops
    forward = frozenset(i for i, op in enumerate(ops) if op.forward)
    live = needed_by(ops, problem.backward_outputs, forward)
    direct = {i for index in live for i in ops[index].inputs if i in forward}
    return frozenset(direct | (forward & set(problem.backward_outputs)))


class CutGraph:
    """The flow network of a problem; built once, solved at many prices.

    Args:
        problem: the step.
        pinned: ops whose results are saved if they are needed at all.
    """

    def __init__(self, problem: Problem, pinned: Collection[int] = ()) -> None:
        ops, pins = problem.ops, frozenset(pinned)
        direct = read_by_backward(problem)
        self.members = sorted(needed_by(ops, direct, frozenset()))
        place = {index: k for k, index in enumerate(self.members)}
        count = len(self.members)
        self.source, self.sink = 2 * count, 2 * count + 1
        free = set(problem.forward_outputs)
        self.save_bytes = np.zeros(count)
        self.times = np.zeros(count)
        self.savable = np.zeros(count, dtype=bool)
        self.banned = np.zeros(count, dtype=bool)
        edges: list[tuple[int, int]] = []
        for k, index in enumerate(self.members):
            op = ops[index]
            self.savable[k] = op.savable and not op.must_recompute
            self.banned[k] = op.must_save or (self.savable[k] and index in pins)
            self.times[k] = op.time_s
            self.save_bytes[k] = sum(problem.storage_bytes[s] for s in op.holds if s not in free)
            edges += [(2 * place[i] + 1, 2 * k) for i in op.inputs]
            if index in direct:
                edges.append((2 * k + 1, self.sink))
        self.fixed = np.array(edges, dtype=np.int64).reshape(-1, 2)

    def solve(self, price: float) -> frozenset[int]:
        """The saved set that minimises recompute time + price x saved bytes.

        Args:
            price: what a saved byte costs, in seconds; at 0 whatever saves time is saved.
        """
        count = len(self.members)
        if count == 0:
            return frozenset()
        save, run = self._capacities(price)
        k = np.arange(count)
        heads = np.concatenate([2 * k, np.full(count, self.source), self.fixed[:, 0]])
        tails = np.concatenate([2 * k + 1, 2 * k, self.fixed[:, 1]])
        capacity = np.concatenate([save, run, np.full(len(self.fixed), _INFINITE)])
        size = 2 * count + 2
        network = csr_array((capacity.astype(np.int32), (heads, tails)), shape=(size, size))
        flow = maximum_flow(network, self.source, self.sink).flow
        residual = network - flow
        residual.data = np.where(residual.data > 0, 1, 0)
        residual.eliminate_zeros()
        reached = np.zeros(size, dtype=bool)
        reached[breadth_first_order(residual, self.source, return_predecessors=False)] = True
        saved = reached[2 * k] & ~reached[2 * k + 1]
        return frozenset(self.members[i] for i in np.flatnonzero(saved))

    def _capacities(self, price: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Integer capacities of the save edges and the recompute edges."""
        # At price 0 a byte still breaks ties: between plans of equal time, save less. No op's time
        # comes near 1e-18 s a byte.
        save = self.save_bytes * max(price, 1e-18)
        total = float(save[self.savable].sum() + self.times.sum()) or 1.0
        scale = _TOTAL / total
        save_capacity = np.ceil(save * scale).astype(np.int64)
        save_capacity[~self.savable] = _INFINITE
        run_capacity = np.ceil(self.times * scale).astype(np.int64)
        run_capacity[self.banned] = _INFINITE
        return save_capacity, run_capacity
