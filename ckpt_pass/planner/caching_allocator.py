"""The bytes that torch's caching allocator hands out for a step, block by block.

An accelerator's memory is not handed out to the byte: a block that is a little too large is handed
out whole. The rules are those of ``c10/cuda/CUDACachingAllocator.cpp`` with its defaults (torch
2.11 to 2.13; without ``expandable_segments``, under which every block is split).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

_MIB = 1 << 20
#: Blocks are multiples of so many bytes.
BLOCK = 512
#: Up to here a request is served from the pool of small blocks ...
_SMALL = _MIB
#: ... of which segments are so large.
_SMALL_SEGMENT = 2 * _MIB
#: Segments for requests below the limit, and the multiple that others are of.
_LARGE_LIMIT, _LARGE_SEGMENT, _LARGE_ROUND = 10 * _MIB, 20 * _MIB, 2 * _MIB


def in_blocks(nbytes: int) -> int:
    """So many bytes, rounded up to whole blocks."""
    return -(-nbytes // BLOCK) * BLOCK


@dataclass(frozen=True, slots=True)
class Lifetime:
    """A storage: its bytes, and the moments between which it is there, the last one excluded."""

    born: int
    died: int
    nbytes: int


def added_up(
    lifetimes: Iterable[Lifetime], workspaces: Mapping[int, int], moments: int
) -> list[int]:
    """The bytes at each moment where memory is handed out to the byte."""
    steps = [0] * (moments + 1)
    for one in lifetimes:
        steps[one.born] += one.nbytes
        steps[one.died] -= one.nbytes
    bytes_at = [*accumulate(steps[:-1])]
    for moment, nbytes in workspaces.items():
        bytes_at[moment] += nbytes
    return bytes_at


def handed_out(
    lifetimes: Iterable[Lifetime], workspaces: Mapping[int, int], moments: int
) -> list[int]:
    """The bytes handed out at each moment of a step that has run before.

    Args:
        lifetimes: of the storages; what dies at a moment is gone before others are born there.
        workspaces: bytes that are there at one moment alone.
        moments: how many there are.
    """
    born: dict[int, list[int]] = defaultdict(list)
    dies: dict[int, list[int]] = defaultdict(list)
    stored = [one for one in lifetimes if one.nbytes]
    for number, one in enumerate(stored):
        born[one.born].append(number)
        dies[min(one.died, moments)].append(number)
    allocator = _Allocator()
    found: list[int] = []
    for _ in range(2):  # the first time memory is taken from the device; then it is used again
        found = _run(allocator, stored, (born, dies), workspaces, moments)
    return found


def _run(
    allocator: _Allocator,
    stored: Sequence[Lifetime],
    events: tuple[Mapping[int, list[int]], Mapping[int, list[int]]],
    workspaces: Mapping[int, int],
    moments: int,
) -> list[int]:
    born, dies = events
    blocks: dict[int, _Block] = {}
    found = []
    for moment in range(moments + 1):
        for number in dies.get(moment, ()):
            if number in blocks:
                allocator.free(blocks.pop(number))
        if moment == moments:
            break
        for number in born.get(moment, ()):
            blocks[number] = allocator.take(stored[number].nbytes)
        nbytes = workspaces.get(moment, 0)
        workspace = allocator.take(nbytes) if nbytes else None
        found.append(allocator.handed_out)
        if workspace is not None:
            allocator.free(workspace)
    return found


@dataclass(slots=True, eq=False)
class _Block:
    """A block of a segment, and its neighbours there."""

    start: int
    size: int
    small: bool
    before: _Block | None = None
    after: _Block | None = None
    free: bool = False

    @property
    def key(self) -> tuple[int, int]:
        return self.size, self.start


@dataclass
class _Pool:
    """Free blocks, smallest first, then lowest first."""

    keys: list[tuple[int, int]] = field(default_factory=list)
    blocks: dict[tuple[int, int], _Block] = field(default_factory=dict)

    def add(self, block: _Block) -> None:
        block.free = True
        insort(self.keys, block.key)
        self.blocks[block.key] = block

    def remove(self, block: _Block) -> None:
        block.free = False
        del self.keys[bisect_left(self.keys, block.key)], self.blocks[block.key]

    def best(self, size: int) -> _Block | None:
        place = bisect_left(self.keys, (size, 0))
        return self.blocks[self.keys[place]] if place < len(self.keys) else None


class _Allocator:
    def __init__(self) -> None:
        self.handed_out = 0
        self._pools = {True: _Pool(), False: _Pool()}
        self._end = 0

    def take(self, nbytes: int) -> _Block:
        size = in_blocks(nbytes)
        small = size <= _SMALL
        pool = self._pools[small]
        block = pool.best(size)
        if block is None:
            block = self._segment(size, small)
        else:
            pool.remove(block)
        rest = block.size - size
        if rest >= BLOCK if small else rest > _SMALL:
            after = _Block(block.start + size, rest, small, block, block.after)
            if block.after is not None:
                block.after.before = after
            block.size, block.after = size, after
            pool.add(after)
        self.handed_out += block.size
        return block

    def free(self, block: _Block) -> None:
        self.handed_out -= block.size
        pool = self._pools[block.small]
        before, after = block.before, block.after
        if after is not None and after.free:
            pool.remove(after)
            block.size, block.after = block.size + after.size, after.after
            if after.after is not None:
                after.after.before = block
        if before is not None and before.free:
            pool.remove(before)
            before.size, before.after = before.size + block.size, block.after
            if block.after is not None:
                block.after.before = before
            block = before
        pool.add(block)

    def _segment(self, size: int, small: bool) -> _Block:
        if small:
            whole = _SMALL_SEGMENT
        elif size < _LARGE_LIMIT:
            whole = _LARGE_SEGMENT
        else:
            whole = -(-size // _LARGE_ROUND) * _LARGE_ROUND
        self._end += whole
        return _Block(self._end - whole, whole, small)
