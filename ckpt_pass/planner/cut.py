"""The time-optimal cut: least recompute time + price x saved bytes, chains included, exactly.

torch's partitioner gives an op that it will not recompute infinite capacity from the source; here
every op has its recompute *time* instead, and its save edge ``price * bytes``. One minimum cut
then decides all ops at once (the classic project-selection form; torch: ``solve_min_cut``).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

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


def mean_price(problem: Problem) -> float:
    """Seconds of the forward for each byte that it makes: the scale of prices for a saved byte."""
    forward = [op for op in problem.ops if op.forward]
    made = sum(problem.storage_bytes[s] for op in forward for s in op.makes)
    return sum(op.time_s for op in forward) / max(made, 1)


@dataclass(frozen=True)
class Cut:
    """A minimum cut.

    Attributes:
        saved, recomputed: flags, one for each member of the network.
        bound: no choice has a lower sum; rounding is taken off.
    """

    saved: NDArray[np.bool_]
    recomputed: NDArray[np.bool_]
    bound: float


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

    @classmethod
    def of(cls, problem: Problem, pinned: Collection[int] = ()) -> CutGraph:
        """The network of a problem; built once for each pinned set."""
        key = "cut " + " ".join(map(str, sorted(pinned)))
        return problem.derived(key, lambda made: cls(made, pinned))

    def solve(self, price: float) -> frozenset[int]:
        """The saved set that minimises recompute time + price x saved bytes.

        Args:
            price: what a saved byte costs, in seconds; at 0 whatever saves time is saved.
        """
        # At price 0 a byte still breaks ties: between plans of equal time, save less. No op's time
        # comes near 1e-18 s a byte.
        saved = self.minimise(self.save_bytes * max(price, 1e-18), self.times).saved
        return frozenset(self.members[i] for i in np.flatnonzero(saved))

    def minimise(self, save: NDArray[np.float64], run: NDArray[np.float64]) -> Cut:
        """The least sum of ``save`` over what is saved and ``run`` over what is recomputed.

        Args:
            save, run: seconds for each member; not negative.
        """
        count = len(self.members)
        if count == 0:
            nothing = np.zeros(0, dtype=bool)
            return Cut(nothing, nothing, 0.0)
        total = float(save[self.savable].sum() + run.sum()) or 1.0
        scale = _TOTAL / total
        save_capacity = np.ceil(save * scale).astype(np.int64)
        save_capacity[~self.savable] = _INFINITE
        run_capacity = np.ceil(run * scale).astype(np.int64)
        run_capacity[self.banned] = _INFINITE
        k = np.arange(count)
        heads = np.concatenate([2 * k, np.full(count, self.source), self.fixed[:, 0]])
        tails = np.concatenate([2 * k + 1, 2 * k, self.fixed[:, 1]])
        forced = np.full(len(self.fixed), _INFINITE)
        capacity = np.concatenate([save_capacity, run_capacity, forced])
        size = 2 * count + 2
        network = csr_array((capacity.astype(np.int32), (heads, tails)), shape=(size, size))
        found = maximum_flow(network, self.source, self.sink)
        residual = network - found.flow
        residual.data = np.where(residual.data > 0, 1, 0)
        residual.eliminate_zeros()
        reached = np.zeros(size, dtype=bool)
        reached[breadth_first_order(residual, self.source, return_predecessors=False)] = True
        # Rounding up adds less than one to each of at most 2 x count edges of the true least cut.
        bound = max(0.0, (int(found.flow_value) - 2 * count) / scale)
        return Cut(reached[2 * k] & ~reached[2 * k + 1], ~reached[2 * k], bound)
