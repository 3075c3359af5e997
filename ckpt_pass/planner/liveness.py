"""The simulator: exact bytes over time of a step that saves a given set of values.

The rules are those of the graphs that really run (``docs/design.md``): the forward runs its ops in
order; in the backward, ops that depend on a tangent keep their order, and every other op stands
just before its first consumer; a storage is freed after its last use; saved storages live from the
forward on, gradients and the forward's outputs to the end.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ckpt_pass.planner.problem import Problem, needed_by


@dataclass(frozen=True)
class MemoryProfile:
    """Bytes over time of a simulated step, above what was allocated when it began.

    Attributes:
        bytes_at: bytes while each op of the schedule runs.
        schedule: the ops in the order in which they run, forward then backward.
        forward_length: how many of them belong to the forward.
        saved_bytes: bytes between forward and backward, the forward's outputs included.
    """

    bytes_at: tuple[int, ...]
    schedule: tuple[int, ...]
    forward_length: int
    saved_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The most bytes at any moment."""
        return max(self.bytes_at, default=0)

    @property
    def peak_index(self) -> int:
        """The place in the schedule where the peak is first reached."""
        return self.bytes_at.index(self.peak_bytes) if self.bytes_at else 0

    @property
    def peak_in_backward(self) -> bool:
        """Whether the peak is reached in the backward."""
        return self.peak_index >= self.forward_length


def simulate(problem: Problem, saved: Collection[int]) -> MemoryProfile:
    """Run a step in thought.

    Args:
        problem: the step.
        saved: indices of the forward ops whose results (all outputs that they make) are saved.

    Returns:
        Exact bytes over time, under the rules above.
    """
    keep = frozenset(saved)
    forward = forward_schedule(problem, keep)
    backward = backward_schedule(problem, keep)
    timeline = _Timeline(problem, set(forward) & set(backward))
    held = {storage for index in keep for storage in problem.ops[index].holds}
    timeline.run(forward, held | set(problem.forward_outputs) | timeline.random_states)
    saved_bytes = timeline.live
    timeline.add(problem.given)
    kept = {*problem.forward_outputs, *problem.output_storages, *problem.given}
    timeline.run(backward, kept)
    return MemoryProfile(
        bytes_at=tuple(timeline.bytes_at),
        schedule=(*forward, *backward),
        forward_length=len(forward),
        saved_bytes=saved_bytes,
    )


def forward_schedule(problem: Problem, saved: frozenset[int]) -> list[int]:
    """The ops that the forward runs: for its outputs and for what is saved."""
    roots = [*problem.forward_roots, *saved]
    return sorted(needed_by(problem.ops, roots, frozenset()))


def backward_schedule(problem: Problem, saved: frozenset[int]) -> list[int]:
    """The backward's ops in the order in which they run (see ``compile/schedule.py``)."""
    ops = problem.ops
    live = needed_by(ops, problem.backward_outputs, saved)
    anchors = [index for index in sorted(live) if ops[index].late]
    order: list[int] = []
    had = set(saved)
    for index in (*anchors, *problem.backward_outputs):  # the latter: those without a tangent
        missing = sorted(needed_by(ops, (index,), had))
        had.update(missing)
        order.extend(missing)
    return order


class _Timeline:
    """Allocates and frees along schedules."""

    def __init__(self, problem: Problem, recomputed: set[int]) -> None:
        self._ops = problem.ops
        self._sizes = dict(enumerate(problem.storage_bytes))
        self._state_of: dict[int, int] = {}
        for index in recomputed:
            if problem.ops[index].random_state_bytes:
                state = len(self._sizes)
                self._state_of[index] = state
                self._sizes[state] = problem.ops[index].random_state_bytes
        self._alive: set[int] = set()
        self.live = 0
        self.bytes_at: list[int] = []

    @property
    def random_states(self) -> set[int]:
        """The storages of the saved random states."""
        return set(self._state_of.values())

    def add(self, storages: Iterable[int]) -> None:
        """Allocate."""
        for storage in storages:
            if storage not in self._alive:
                self._alive.add(storage)
                self.live += self._sizes[storage]

    def drop(self, storages: Iterable[int], kept: set[int]) -> None:
        """Free what is alive and not to be kept."""
        for storage in storages:
            if storage in self._alive and storage not in kept:
                self._alive.discard(storage)
                self.live -= self._sizes[storage]

    def _touches(self, index: int) -> tuple[int, ...]:
        state = self._state_of.get(index)
        touches = self._ops[index].touches
        return touches if state is None else (*touches, state)

    def run(self, schedule: list[int], kept: set[int]) -> None:
        """Run ops in order; free each storage after its last use, unless it is kept."""
        last = {s: place for place, index in enumerate(schedule) for s in self._touches(index)}
        self.drop([s for s in self._alive if s not in last], kept)
        for place, index in enumerate(schedule):
            op, touches = self._ops[index], self._touches(index)
            # An output that was saved is made again with its op's others, and dropped at once.
            again = sum(self._sizes[s] for s in op.makes if s in self._alive)
            self.add(op.makes)
            if index in self._state_of:
                again += op.random_state_bytes if self._state_of[index] in self._alive else 0
                self.add((self._state_of[index],))
            self.bytes_at.append(self.live + op.workspace_bytes + again)
            self.drop([s for s in touches if last[s] == place], kept)
