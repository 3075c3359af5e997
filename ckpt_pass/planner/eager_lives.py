"""Where the storages of a simulated eager step are in memory, and what they are there for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ckpt_pass.planner.alive import (
    BACKWARD,
    GRADIENT,
    MOVED,
    OUTPUT,
    PASSING,
    RECOMPUTED,
    SAVED,
    STATE,
    WORKSPACE,
    Life,
)
from ckpt_pass.planner.eager_moves import Journeys
from ckpt_pass.planner.eager_parts import EagerOp, EagerStorage
from ckpt_pass.planner.eager_shares import ShareLife
from ckpt_pass.planner.eager_table import Ints


@dataclass(frozen=True)
class StateLives:
    """Random states that regions hold, one entry each: places, the last one not included."""

    op: Ints
    nbytes: Ints
    begin: Ints
    end: Ints


@dataclass(frozen=True)
class EagerLives:
    """Memory along a simulated step, by places; ends are not included.

    Attributes:
        begins, ends: of each storage, where the program makes it.
        again: the storages that regions make a second time.
        again_begins, again_ends: where.
        states: random states.
        moved: what leaves, and comes back.
        shares: what ranks share out.
        ran: which op runs at each place.
        forward_length: places of the forward.
    """

    begins: Ints
    ends: Ints
    again: Ints
    again_begins: Ints
    again_ends: Ints
    states: StateLives
    moved: Journeys
    shares: tuple[ShareLife, ...]
    ran: Ints
    forward_length: int

    def back(self) -> Iterator[tuple[int, int, int]]:
        """What has come back: storage, begin and end."""
        for stay in self.moved.stays:
            yield stay.storage, min(stay.fetched, len(self.ran) - 1), stay.end

    def bytes_at(self, nbytes: Ints, workspace: Ints) -> Ints:
        """Bytes at each place.

        Args:
            nbytes: of each storage.
            workspace: of each op.
        """
        length = len(self.ran)
        delta = np.zeros(length + 2, dtype=np.int64)
        np.add.at(delta, self.begins, nbytes)
        np.add.at(delta, self.ends, -nbytes)
        np.add.at(delta, self.again_begins, nbytes[self.again])
        np.add.at(delta, self.again_ends, -nbytes[self.again])
        np.add.at(delta, self.states.begin, self.states.nbytes)
        np.add.at(delta, self.states.end, -self.states.nbytes)
        for storage, begin, end in self.back():
            delta[begin] += nbytes[storage]
            delta[end] -= nbytes[storage]
        for share in self.shares:
            delta[share.begin] += share.nbytes
            delta[share.end] -= share.nbytes
        found: Ints = np.cumsum(delta)[:length] + workspace[self.ran]
        return found

    def alive(self, ops: Sequence[EagerOp], storages: Sequence[EagerStorage]) -> tuple[Life, ...]:
        """The lives, in the order in which they begin; they add up to :meth:`bytes_at`."""
        found = (*self._first(len(ops), storages), *self._further(ops, storages))
        there = (life for life in found if life.nbytes and life.first <= life.last)
        return tuple(sorted(there, key=lambda life: (life.first, life.maker, life.last)))

    def _first(self, end_of_step: int, storages: Sequence[EagerStorage]) -> Iterator[Life]:
        """What the program itself makes."""
        leaves = {one.storage for one in self.moved.leaving}
        again = set(self.again.tolist())
        spans = zip(self.begins.tolist(), self.ends.tolist(), strict=True)
        for number, (begin, end) in enumerate(spans):
            storage = storages[number]
            stays = storage.dies >= end_of_step
            if begin >= self.forward_length:
                kind = GRADIENT if stays else BACKWARD
            elif number in leaves:
                kind = MOVED
            elif stays:
                kind = OUTPUT
            elif end > self.forward_length:
                kind = SAVED
            else:
                kind = RECOMPUTED if number in again else PASSING
            yield Life(storage.born, storage.nbytes, begin, end - 1, kind)

    def _further(self, ops: Sequence[EagerOp], storages: Sequence[EagerStorage]) -> Iterator[Life]:
        """What is made again, what has come back, random states and workspaces."""
        columns = (self.again, self.again_begins, self.again_ends)
        for number, begin, end in zip(*(c.tolist() for c in columns), strict=True):
            storage = storages[number]
            yield Life(storage.born, storage.nbytes, begin, end - 1, RECOMPUTED)
        for number, begin, end in self.back():
            storage = storages[number]
            yield Life(storage.born, storage.nbytes, begin, end - 1, MOVED)
        for share in self.shares:
            kind = SAVED if share.is_part else MOVED
            born = storages[share.storage].born
            yield Life(born, share.nbytes, share.begin, share.end - 1, kind)
        states = self.states
        held = (states.op, states.nbytes, states.begin, states.end)
        for op, nbytes, begin, end in zip(*(c.tolist() for c in held), strict=True):
            yield Life(op, nbytes, begin, end - 1, STATE)
        for place, op in enumerate(self.ran.tolist()):
            yield Life(op, ops[op].workspace_bytes, place, place, WORKSPACE)
