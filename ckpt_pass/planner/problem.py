"""The problem: ops, storages, bytes and order, without torch.

One step is a list of ops in joint order: the forward first, then the backward. An op reads
storages and makes new ones; a view makes none. Everything that a solver or the simulator needs is
in these tuples, so that a problem can be written by hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

from ckpt_pass.errors import CkptPassError


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


@dataclass(frozen=True)
class Problem:
    """What happens in a training step and what it keeps alive.

    Attributes:
        ops: in joint order.
        storage_bytes: bytes of each storage; 0 for those that existed before the step
            (parameters, inputs).
        forward_outputs: storages that the caller holds from the end of the forward on.
        forward_roots: ops that the forward runs for its outputs.
        backward_outputs: ops whose results are the gradients, in the order they are returned.
        output_storages: storages of the gradients, which live to the end.
        given: storages that the backward starts with besides what was saved: tangents.
    """

    ops: tuple[Op, ...]
    storage_bytes: tuple[int, ...]
    forward_outputs: tuple[int, ...]
    forward_roots: tuple[int, ...]
    backward_outputs: tuple[int, ...]
    output_storages: tuple[int, ...]
    given: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for index, op in enumerate(self.ops):
            if any(source >= index or source < 0 for source in op.inputs):
                raise InvalidProblemError(
                    f"Op {index} ({op.name}) takes the result of ops {op.inputs}, expected "
                    f"indices below {index}: list the ops in an order in which they can run."
                )
        if any(nbytes < 0 for nbytes in self.storage_bytes):
            raise InvalidProblemError("A storage has negative bytes; expected 0 or more.")


def needed_by(ops: Sequence[Op], roots: Iterable[int], stop: Set[int]) -> set[int]:
    """The ops that must run to have the results of ``roots``, where those in ``stop`` are had."""
    needed: set[int] = set()
    stack = [root for root in roots if root not in stop]
    while stack:
        index = stack.pop()
        if index not in needed:
            needed.add(index)
            stack.extend(i for i in ops[index].inputs if i not in stop and i not in needed)
    return needed
