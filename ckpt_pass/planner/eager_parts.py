"""What an eager step consists of for the planner, and what a plan says of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EagerOp:
    """One op of the step.

    Attributes:
        name: its call site, in words.
        time_s, flops: modelled cost of running it.
        workspace_bytes: what its kernel needs besides its outputs.
        makes: the storages that it allocates.
        keepable: whether its outputs can be kept by a region that is recomputed.
        must_keep: whether a region must keep them: it must not run twice.
        cached: whether only the first of several calls of a module runs it; the others find what it
            makes in a cache.
    """

    name: str
    time_s: float
    flops: int
    workspace_bytes: int
    makes: tuple[int, ...]
    keepable: bool = False
    must_keep: bool = False
    cached: bool = False


@dataclass(frozen=True, slots=True)
class EagerStorage:
    """Memory that an op allocates.

    Attributes:
        nbytes: its size.
        born: the op that allocates it.
        dies: the moment from which only autograd may hold it (the end, where something else does).
        of_graph: whether autograd's graph holds it itself, in a region until that is done with.
        shared: whether all microbatches have it together (gathered parameters).
        added: whether it is a gradient that is added to what an earlier microbatch has left. Of the
            first microbatch it is what is left.
    """

    nbytes: int
    born: int
    dies: int
    of_graph: bool = False
    shared: bool = False
    added: bool = False


@dataclass(frozen=True, slots=True)
class SavedValue:
    """One value that autograd saves for the backward.

    Attributes:
        storage: what holds it; -1 where it existed before the step.
        released: the moment when autograd lets go.
        asked: whether the backward looks at it. A region that has made it again lets go of it then,
            and otherwise when it is done.
        saved_at, asked_at: the moments when it is saved, and when the backward looks at it.
        turn: the how manyth that is.
        node: tells whether the same node saves another one.
        waits: whether it goes when another node saves something, not at once.
    """

    storage: int
    released: int
    asked: bool = True
    saved_at: int = 0
    asked_at: int = 0
    turn: int = 0
    node: int = 0
    waits: bool = False


@dataclass(frozen=True, slots=True)
class EagerRegion:
    """A module call that can be a checkpoint region.

    Attributes:
        name: FQN of the module.
        parent: the smallest region around it; -1 for none.
        ops: first op and the one after the last.
        values: first saved value and the one after the last.
        needed: how many of its ops run again: none after the last saved value.
        reruns: the backward's op before which it runs again.
        done: the moment when the last of its saved values is released.
        arguments: storages from outside that its ops use.
        extra_bytes: held besides (a random state, copies of buffers that it overwrites).
        draws: whether a random state is among them.
        dropped: storages that it makes, which Python lets go at its end if it is one.
        moves: those of its values that go if it moves.
        sent: those of its arguments that go if they move.
        parts: those that ranks may share out: the storage, the bytes of a part, and the bytes that
            are gathered.
        casts: storages from outside that it makes anew, since a cache of casts had them: each with
            the number of its ops that have run by then.
    """

    name: str
    parent: int
    ops: tuple[int, int]
    values: tuple[int, int]
    needed: int
    reruns: int
    done: int
    arguments: tuple[int, ...]
    extra_bytes: int = 0
    draws: bool = False
    dropped: tuple[int, ...] = ()
    moves: tuple[int, ...] = ()
    sent: tuple[int, ...] = ()
    parts: tuple[tuple[int, int, int], ...] = ()
    casts: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks that values are shared out over.

    Attributes:
        count: how many there are.
        bytes_per_s: from the others.
        latency_s: of a gather, whatever its size.
    """

    count: int
    bytes_per_s: float
    latency_s: float = 0.0

    def received_bytes(self, whole_bytes: int) -> int:
        """What comes from other ranks when a value is gathered."""
        return whole_bytes - whole_bytes // self.count

    def gather_s(self, whole_bytes: int) -> float:
        """Seconds of a gather."""
        return self.latency_s + self.received_bytes(whole_bytes) / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class Microbatches:
    """What lies in memory beside one microbatch.

    Attributes:
        first: how many have run forward and not yet backward, at the most, before a backward has
            ended, with this one.
        later: the same afterwards.
        held_bytes: gradients, which are there afterwards.
        passed_bytes: on the way to or from other stages.
    """

    first: int = 1
    later: int = 1
    held_bytes: int = 0
    passed_bytes: int = 0


@dataclass(frozen=True)
class EagerPlan:
    """What is checkpointed, and what moves.

    Attributes:
        regions: those that run again; none overlaps another, nor one that moves.
        kept: the ops that they keep.
        sends: those of the regions that run again whose arguments move meanwhile.
        moved: the regions that move instead.
        ahead: how many values are fetched before they are asked for.
        shards: those of the regions that run again whose arguments ranks share out.
    """

    regions: frozenset[int] = frozenset()
    kept: frozenset[int] = frozenset()
    sends: frozenset[int] = frozenset()
    moved: frozenset[int] = frozenset()
    ahead: int = 0
    shards: frozenset[int] = frozenset()
