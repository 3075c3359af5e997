"""Values that no kernel writes to memory: what reads them computes them again from their sources.

A compiler that fuses elementwise ops (Inductor) makes one kernel of a chain of them, and computes a
value inside of each kernel that reads it. Such a value takes no memory; what it is made from has to
be there when it is read. It is the view of several storages then: nothing is allocated for it, and
what touches it touches these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ckpt_pass.planner.problem import Op

#: What a value that is read once, and one that is read more often, may be made from at most, in
#: storages: Inductor writes it down beyond that (``realize_acc_reads_threshold`` and
#: ``realize_reads_threshold`` of ``torch/_inductor/config.py``).
_READS_ONCE, _READS_OFTEN = 8, 4


@dataclass(frozen=True)
class Inlinable:
    """An op whose result is read by fused kernels alone.

    Attributes:
        readers: how many ops read it.
        heavy: whether it is so slow that it is not computed twice.
    """

    readers: int
    heavy: bool = False


def with_inlined(
    ops: Sequence[Op], storage_bytes: Sequence[int], candidates: Mapping[int, Inlinable]
) -> tuple[Op, ...]:
    """Ops of which some make nothing.

    An op of the forward whose result could be saved is left alone where its sources take more bytes
    than the result: what is saved in the place of the one would be the other.

    Args:
        ops: in joint order.
        storage_bytes: bytes of each storage; 0 for those that existed before the step.
        candidates: what may be inlined, by op.
    """
    sources: dict[int, tuple[int, ...]] = {}  # of each storage that nobody makes any more
    heavy: set[int] = set()  # those of them that are slow to compute
    found: list[Op] = []
    for index, op in enumerate(ops):
        slow = not heavy.isdisjoint(op.touches)
        if not sources.keys().isdisjoint(op.touches):
            op = replace(op, holds=_behind(op.holds, sources), touches=_behind(op.touches, sources))
        candidate = candidates.get(index)
        if candidate is not None and _is_inlined(op, candidate, slow, storage_bytes):
            (storage,) = op.makes
            sources[storage] = reads = _reads(op)
            if slow or candidate.heavy:
                heavy.add(storage)
            op = _view(op, reads)
        found.append(op)
    return tuple(found)


def _view(op: Op, reads: tuple[int, ...]) -> Op:
    return replace(
        op,
        makes=(),
        holds=reads,
        touches=reads,
        time_s=0.0,
        workspace_bytes=0,
        savable=False,
        overwrites=(),
    )


def _reads(op: Op) -> tuple[int, ...]:
    return tuple(s for s in op.touches if s not in op.makes)


def _is_inlined(op: Op, candidate: Inlinable, slow: bool, storage_bytes: Sequence[int]) -> bool:
    if len(op.makes) != 1:
        return False
    often = candidate.readers > 1
    if often and (slow or candidate.heavy):
        return False
    reads = _reads(op)
    if len(reads) > (_READS_OFTEN if often else _READS_ONCE):
        return False
    return not op.savable or sum(storage_bytes[s] for s in reads) <= storage_bytes[op.makes[0]]


def _behind(storages: Sequence[int], sources: Mapping[int, tuple[int, ...]]) -> tuple[int, ...]:
    found = (s for storage in storages for s in sources.get(storage, (storage,)))
    return tuple(dict.fromkeys(found))
