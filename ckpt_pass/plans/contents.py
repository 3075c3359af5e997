"""What is in memory at each moment of a step, by the op that made it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from ckpt_pass.planner.alive import OTHERS, Life

#: A module's name up to and with its first index: the layer that it stands in.
_LAYER = re.compile(r"^(.*?\.)?\d+(?=\.|$)")
#: What no op of the step makes.
_UNMADE = {OTHERS: "beside this step"}


@dataclass(frozen=True, slots=True)
class OpName:
    """An op of the step, for people.

    Attributes:
        layer: the layer that it belongs to, or whose forward it differentiates.
        words: its call site; of an op of the backward the module and the op.
    """

    layer: str
    words: str


#: What has no op.
NO_OP = OpName("", "handed to the backward")


def layer_of(region: str | None, fqn: str) -> str:
    """The layer of an op: its region, else its module up to the first index, else the outermost."""
    if region:
        return region
    found = _LAYER.match(fqn)
    return found.group() if found else fqn.partition(".")[0]


@dataclass(frozen=True)
class Contents:
    """What is in memory at each place of a plan's timeline; adds up to its bytes.

    Attributes:
        names: the ops of the step.
        ran: the op at each place, a number of ``names``.
        lives: what takes memory, in the order in which it begins; makers are numbers of ``names``.
    """

    names: tuple[OpName, ...]
    ran: tuple[int, ...]
    lives: tuple[Life, ...]

    def running(self, place: int) -> OpName:
        """The op that runs at a place."""
        return self.names[self.ran[place]]

    def at(self, place: int) -> tuple[Life, ...]:
        """What is in memory while the op at a place runs, most bytes first."""
        there = (life for life in self.lives if life.first <= place <= life.last)
        return tuple(sorted(there, key=lambda life: (-life.nbytes, life.first, life.maker)))

    def name(self, life: Life) -> OpName:
        """What made it."""
        if life.maker < 0:
            return OpName("", _UNMADE.get(life.kind, NO_OP.words))
        return self.names[life.maker]

    def bytes_at(self) -> tuple[int, ...]:
        """Bytes at each place."""
        change = [0] * (len(self.ran) + 1)
        for life in self.lives:
            change[life.first] += life.nbytes
            change[life.last + 1] -= life.nbytes
        return tuple(accumulate(change[:-1]))


def contents_of(
    names: Sequence[OpName], ran: Sequence[int], lives: Sequence[Life], bytes_at: Sequence[int]
) -> Contents:
    """The contents of a timeline.

    Args:
        names: the ops of the step; those that nothing refers to are left out.
        ran: which of them runs at each place.
        lives: what takes memory.
        bytes_at: the bytes of the timeline; what they are above the lives lies beside the step.
    """
    found = Contents(tuple(names), tuple(ran), tuple(lives))
    pairs = zip(bytes_at, found.bytes_at(), strict=True)
    rest = tuple(_runs([most - known for most, known in pairs]))
    used = sorted({*ran, *(life.maker for life in lives if life.maker >= 0)})
    number = {old: new for new, old in enumerate(used)} | {-1: -1}
    return Contents(
        tuple(names[old] for old in used),
        tuple(number[old] for old in ran),
        tuple(
            Life(number[life.maker], life.nbytes, life.first, life.last, life.kind)
            for life in (*lives, *rest)
        ),
    )


def _runs(levels: Sequence[int]) -> Iterator[Life]:
    """A life for each stretch of equal bytes that nothing is known of."""
    begin = 0
    for place in range(1, len(levels) + 1):
        if place == len(levels) or levels[place] != levels[begin]:
            if levels[begin]:
                yield Life(-1, levels[begin], begin, place - 1, OTHERS)
            begin = place
