"""Share a step's budget among its graphs: for each graph one of several plans, the step within it.

A graph's plan for fewer bytes saves less, which every moment until its backward has more room for,
and takes less itself while it runs. What each of its plans has more or less than the plan that
recomputes nothing is known from the plan, and the bytes of the step at each moment, with nothing
recomputed, from a run on fake tensors. What is left is a choice of one plan for each graph, least
recomputation first: a small mixed-integer program (scipy's HiGHS).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import sparse
from scipy.optimize import LinearConstraint, milp

from ckpt_pass.compile.dry_run import StepPeak
from ckpt_pass.planner.solution import Solution
from ckpt_pass.steps.graphs import StepRun

#: What a second of copying that nothing waits for is taken to cost: of two plans that are as fast,
#: the one that moves less.
_LOAD = 1e-3


@dataclass(frozen=True)
class Level:
    """One of the plans of a graph, by what it changes.

    Attributes:
        budget_bytes, waiting_bytes: what the plan was made for: its peak, and what others hold
            between its forward and its backward, are within the budget.
        saved: bytes more (less than 0: fewer) between its forward and its backward.
        forward, backward: bytes more at the most while either runs.
        time_s: modelled seconds of recomputation, and of waiting for copies.
        measured: whether the bytes are those of what inductor makes of the plan.
    """

    budget_bytes: int
    waiting_bytes: int
    saved: int
    forward: int
    backward: int
    time_s: float
    measured: bool = False

    def beside(self, found: StepPeak, plain: StepPeak) -> Level:
        """The same with what inductor makes of it, beside what it makes of no recomputation."""
        return replace(
            self,
            saved=found.between - plain.between,
            forward=found.forward - plain.forward,
            backward=found.backward - plain.backward,
            measured=True,
        )


def level_of(found: Solution, plain: Solution, budget_bytes: int, waiting_bytes: int = 0) -> Level:
    """What a plan of a graph changes beside the one that recomputes nothing."""
    (forward, backward), (forward_0, backward_0) = _peaks(found), _peaks(plain)
    return Level(
        budget_bytes=budget_bytes,
        waiting_bytes=waiting_bytes,
        saved=held_between(found) - held_between(plain),
        forward=forward - forward_0,
        backward=backward - backward_0,
        time_s=float(found.overhead_s + _LOAD * (found.times.busy_s if found.times else 0.0)),
    )


def _peaks(found: Solution) -> tuple[int, int]:
    line = found.profile
    at, border = line.bytes_at, line.forward_length
    return max(at[:border], default=0), max(at[border:], default=0)


def held_between(found: Solution) -> int:
    """What a graph holds between its forward and its backward, and what the caller has of it."""
    return found.profile.saved_bytes


@dataclass(frozen=True)
class _Moment:
    """A stretch of the step: its bytes with nothing recomputed, and whose plans change them.

    Attributes:
        nbytes: the most bytes meanwhile.
        held: the graphs between whose forward and backward it lies, once for each call.
        running: the graph that runs, if one does.
        is_backward: whether its backward does.
    """

    nbytes: int
    held: tuple[int, ...]
    running: int | None = None
    is_backward: bool = False

    def changes(self, levels: Sequence[Sequence[Level]]) -> Iterator[tuple[int, int, int]]:
        """(graph, level, bytes) of what each plan changes."""
        for graph in self.held:
            for number, level in enumerate(levels[graph]):
                yield graph, number, level.saved
        if self.running is not None:
            for number, level in enumerate(levels[self.running]):
                yield (
                    self.running,
                    number,
                    level.backward if self.is_backward else level.forward,
                )


def moments_of(run: StepRun) -> list[_Moment]:
    """The stretches of a step in which graphs run, and those between them."""
    spans = [(call.forward, call.graph, False) for call in run.calls]
    spans += [(call.backward, call.graph, True) for call in run.calls if call.backward is not None]
    held: list[int] = []
    found = []
    before = 0
    for (start, end), graph, is_backward in sorted(spans):
        found.append(_Moment(run.curve.most(before, start), tuple(held)))
        if is_backward:
            held.remove(graph)
        found.append(_Moment(run.curve.most(start, end), tuple(held), graph, is_backward))
        if not is_backward:
            held.append(graph)
        before = end
    return [*found, _Moment(run.curve.most(before), tuple(held))]


def peak_of(
    moments: Sequence[_Moment], levels: Sequence[Sequence[Level]], chosen: Sequence[int]
) -> int:
    """The peak of the step with a level of each graph, by what each changes alone."""

    def bytes_at(moment: _Moment) -> int:
        changed = moment.changes(levels)
        return moment.nbytes + sum(n for graph, level, n in changed if chosen[graph] == level)

    return max(map(bytes_at, moments), default=0)


def choose(
    moments: Sequence[_Moment], levels: Sequence[Sequence[Level]], budget_bytes: int
) -> list[int] | None:
    """The level of each graph with the least recomputation in all; ``None`` where nothing fits.

    Args:
        moments: the stretches of the step.
        levels: the plans of each graph.
        budget_bytes: what the step may take at each of them.
    """
    costs = [level.time_s for some in levels for level in some]
    # Of equally fast plans those that save less.
    ties = np.array([level.saved for some in levels for level in some], dtype=float)
    scale = 1e-9 * (max(costs, default=0.0) or 1.0) / (np.abs(ties).max(initial=0) or 1.0)
    found = _solve(moments, levels, np.array(costs) + scale * ties, budget_bytes)
    return None if found is None else found[0]


def least(moments: Sequence[_Moment], levels: Sequence[Sequence[Level]]) -> list[int]:
    """The level of each graph with the lowest peak of the step."""
    size = sum(map(len, levels))
    found = _solve(moments, levels, np.zeros(size), None)
    assert found is not None  # every graph has a level, and the peak is free
    return found[0]


def _solve(
    moments: Sequence[_Moment],
    levels: Sequence[Sequence[Level]],
    costs: np.ndarray,
    budget_bytes: int | None,
) -> tuple[list[int], float] | None:
    """One level each, of least cost within a budget; without one, of least peak."""
    firsts = np.concatenate([[0], np.cumsum([len(some) for some in levels])]).astype(int)
    size = int(firsts[-1])
    one = sparse.lil_array((len(levels), size + 1))
    for graph in range(len(levels)):
        one[graph, firsts[graph] : firsts[graph + 1]] = 1
    rows = sparse.lil_array((len(moments), size + 1))
    for row, moment in enumerate(moments):
        for graph, number, nbytes in moment.changes(levels):
            rows[row, firsts[graph] + number] += nbytes / _UNIT
        rows[row, size] = -1
    bytes_at = np.array([moment.nbytes for moment in moments]) / _UNIT
    bound = np.inf if budget_bytes is None else budget_bytes / _UNIT
    solved = milp(
        np.append(costs, 1.0 if budget_bytes is None else 0.0),
        integrality=np.append(np.ones(size), 0),
        bounds=(np.append(np.zeros(size), -np.inf), np.append(np.ones(size), bound)),
        constraints=[
            LinearConstraint(one.tocsr(), 1, 1),
            LinearConstraint(rows.tocsr(), -np.inf, -bytes_at),
        ],
    )
    if solved.x is None:
        return None
    picked = [
        int(np.argmax(solved.x[firsts[graph] : firsts[graph + 1]])) for graph in range(len(levels))
    ]
    return picked, float(solved.x[size])


#: Bytes in a unit of the program, so that its coefficients are near to 1.
_UNIT = 1024.0**2
