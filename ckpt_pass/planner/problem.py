"""The problem: ops, storages, bytes and order, without torch.

One step is a list of ops in joint order: the forward first, then the backward. An op reads
storages and makes new ones; a view makes none. Everything that a solver or the simulator needs is
in these tuples, so that a problem can be written by hand.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

from ckpt_pass._errors import CkptPassError

_T = TypeVar("_T")


class InvalidProblemError(CkptPassError):
    """A problem contradicts itself: an op reads what nobody has made, or bytes are negative."""


@dataclass(frozen=True, slots=True)
class Op:
    """One op of the joint graph.

    Attributes:
        name: for people.
        inputs: indices of the ops whose results it takes (views are ops too).
        makes: storages that it allocates.
        holds: storages of its result: those to keep when the result is saved.
        touches: every storage that it reads or makes, through views too.
        forward: whether the forward runs it.
        late: whether it depends on a tangent, so that it cannot run before the backward.
        workspace_bytes: allocated while it runs and freed when it ends.
        random_state_bytes: saved by the forward if the op runs again in the backward.
        time_s, flops: of running it once.
        savable: whether its result can be kept: a tensor with a storage of its own.
        must_save, must_recompute: what is not open to a solver. An op that must be saved but is
            not savable (one of several outputs is) must not be recomputed.
        region: the layer that it belongs to, or whose backward it is part of; -1 for none.
        ordered: whether it has an effect, so that it keeps its place in the backward.
        overwrites: storages that it reads and whose memory its result takes, where the backward
            has made them and needs them no more: then nothing is allocated. Each is as large as
            the one storage that it makes.
        once: whether the backward may run it once at most: each run of a random op moves on the
            state that it draws from, where that lies in a generator.
    """

    name: str
    inputs: tuple[int, ...]
    makes: tuple[int, ...]
    holds: tuple[int, ...]
    touches: tuple[int, ...]
    forward: bool
    late: bool = False
    workspace_bytes: int = 0
    random_state_bytes: int = 0
    time_s: float = 0.0
    flops: int = 0
    savable: bool = False
    must_save: bool = False
    must_recompute: bool = False
    region: int = -1
    ordered: bool = False
    once: bool = False
    overwrites: tuple[int, ...] = ()


@dataclass(frozen=True)
class Problem:
    """What happens in a training step and what it keeps alive.

    Attributes:
        ops: in joint order.
        storage_bytes: bytes of each storage; 0 for those that existed before the step
            (parameters, inputs).
        forward_outputs: storages that the caller holds from the end of the forward on.
        forward_roots: ops that the forward runs for its outputs, or to write into inputs.
        backward_outputs: ops whose results are the gradients, in the order they are returned, and
            then those that the backward runs for an effect.
        output_storages: storages of the gradients, which live to the end.
        given: storages that the backward starts with besides what was saved: tangents.
        immovable: storages that must stay on the device, whoever could do without them there.
        must_move: storages that are moved where they are saved and there is a link.
    """

    ops: tuple[Op, ...]
    storage_bytes: tuple[int, ...]
    forward_outputs: tuple[int, ...]
    forward_roots: tuple[int, ...]
    backward_outputs: tuple[int, ...]
    output_storages: tuple[int, ...]
    given: tuple[int, ...] = ()
    immovable: tuple[int, ...] = ()
    must_move: tuple[int, ...] = ()
    _derived: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def derived(self, name: str, make: Callable[[Problem], _T]) -> _T:
        """What a module derives from the problem alone; made once, kept with it."""
        if name not in self._derived:
            self._derived[name] = make(self)
        found: _T = self._derived[name]
        return found

    @cached_property
    def inputs(self) -> tuple[tuple[int, ...], ...]:
        """For each op, the ops whose results it takes."""
        return tuple(op.inputs for op in self.ops)

    @cached_property
    def forward_ops(self) -> frozenset[int]:
        """The ops of the forward."""
        return frozenset(index for index, op in enumerate(self.ops) if op.forward)

    @cached_property
    def several_outputs(self) -> frozenset[int]:
        """The ops that allocate more than one storage."""
        return frozenset(index for index, op in enumerate(self.ops) if len(op.makes) > 1)

    @cached_property
    def holders(self) -> dict[int, frozenset[int]]:
        """For each storage, the ops whose results hold it: what allocates it, and its views."""
        found: dict[int, set[int]] = defaultdict(set)
        for index, op in enumerate(self.ops):
            for storage in op.holds:
                found[storage].add(index)
        return {storage: frozenset(ops) for storage, ops in found.items()}

    @cached_property
    def held(self) -> frozenset[int]:
        """Storages that the caller has through the backward, whatever the step does."""
        return frozenset((*self.forward_outputs, *self.given))

    @cached_property
    def users(self) -> tuple[tuple[int, ...], ...]:
        """For each op, the ops that take its result."""
        found: list[list[int]] = [[] for _ in self.ops]
        for index, op in enumerate(self.ops):
            for source in op.inputs:
                found[source].append(index)
        return tuple(tuple(users) for users in found)

    @cached_property
    def makers(self) -> dict[int, int]:
        """For each storage that the step allocates, the op that does."""
        return {storage: index for index, op in enumerate(self.ops) for storage in op.makes}

    @cached_property
    def bound(self) -> frozenset[int]:
        """What must be saved, if the backward reads it."""
        return frozenset(i for i, op in enumerate(self.ops) if op.must_save and op.savable)

    def may_repeat(self, index: int) -> bool:
        """Whether the backward may run an op more than once."""
        op = self.ops[index]
        return not (op.late or op.ordered or op.once or op.must_save)

    def __post_init__(self) -> None:
        for index, op in enumerate(self.ops):
            if any(source >= index or source < 0 for source in op.inputs):
                raise InvalidProblemError(
                    f"Op {index} ({op.name}) takes the result of ops {op.inputs}, expected "
                    f"indices below {index}: list the ops in an order in which they can run."
                )
            unlike = [s for s in op.overwrites if not self._may_overwrite(op, s)]
            if unlike:
                raise InvalidProblemError(
                    f"Op {index} ({op.name}) overwrites storage {unlike[0]}, expected one that it "
                    "reads and that is as large as the one storage that it makes."
                )
        if any(nbytes < 0 for nbytes in self.storage_bytes):
            raise InvalidProblemError("A storage has negative bytes; expected 0 or more.")

    def _may_overwrite(self, op: Op, storage: int) -> bool:
        sizes = self.storage_bytes
        read = storage in op.touches and storage not in op.makes
        return read and len(op.makes) == 1 and sizes[storage] == sizes[op.makes[0]]


def with_waiting(problem: Problem, nbytes: int) -> Problem:
    """The problem where others hold so many bytes between its forward and its backward.

    A step of several graphs runs the later ones then. An op without a result comes last in the
    forward and takes those bytes while it runs; all others keep their numbers.
    """
    if not nbytes:
        return problem
    wait = Op("others", (), (), (), (), forward=True, workspace_bytes=nbytes, must_save=True)
    return replace(
        problem,
        ops=(*problem.ops, wait),
        forward_roots=(*problem.forward_roots, len(problem.ops)),
    )


def with_costs(problem: Problem) -> Problem:
    """The problem where every op that makes something takes time, as much as the mean if none.

    To recompute nothing means nothing at all then, whatever is fused.
    """
    times = [op.time_s for op in problem.ops if op.time_s]
    free = [op for op in problem.ops if op.makes and not op.time_s]
    if not times or not free:
        return problem
    mean = sum(times) / len(times)
    ops = (replace(op, time_s=op.time_s or mean) if op.makes else op for op in problem.ops)
    return replace(problem, ops=tuple(ops))


def needed_by(ops: Sequence[Op], roots: Iterable[int], stop: Set[int]) -> set[int]:
    """The ops that must run to have the results of ``roots``, where those in ``stop`` are had."""
    needed: set[int] = set()
    stack = [root for root in roots if root not in stop]
    while stack:
        index = stack.pop()
        if index not in needed:
            needed.add(index)
            stack += [i for i in ops[index].inputs if i not in stop and i not in needed]
    return needed
