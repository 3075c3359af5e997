"""What earlier runs of a region have told, so that later ones need not look at every op."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from ckpt_pass.regions.holders import Holders
from ckpt_pass.regions.noted import Noted, Searched
from ckpt_pass.regions.saved_values import Looks
from ckpt_pass.regions.tracks import Track, track_of
from ckpt_pass.state.objects import global_generators

#: So often a way may be looked for, beyond how often it was taken, until it is no longer.
_PATIENCE = 8


class Known:
    """What earlier runs of a region have told; nothing in it leads back to the region's module.

    Attributes:
        watched: whether a run was looked at, op by op, in the mode (training or not) of this one.
        quiet: whether such runs have left everything as they found it.
        overwritten: names of the tensors that the region overwrites, as :meth:`Outside.name_of`
            gives them.
        repointed: of those that it makes look at other memory (``tensor.data = ...``).
        generators: those of the global random generators that it draws from; all of them until
            that is known.
        draws: whether it draws torch's random numbers, or may set a random state: then the state
            says nothing when it is the same afterwards as before (a seed, ``fork_rng``).
        reads_statistics: whether it reads running statistics that it has moved.
        short_tail: how many values that run had saved, and what the last looks like, if little was
            left to be run then.
        fills: whether it runs an op that autograd saves an argument of before the op has filled it.
        name: of the module's class or of the function, once it is needed.
        compared: of what it keeps in parts, that which ranks have compared.
    """

    __slots__ = (
        "__weakref__",
        "_drawn",
        "_found",
        "_lost",
        "_mode",
        "_modes",
        "_track",
        "compared",
        "draws",
        "fills",
        "generators",
        "name",
        "overwritten",
        "quiet",
        "reads_statistics",
        "repointed",
        "short_tail",
        "watched",
    )

    def __init__(self) -> None:
        self.watched = False
        self.quiet = self.fills = self.draws = self.reads_statistics = False
        self.overwritten: set[str] = set()
        self.repointed: set[str] = set()
        self.generators = global_generators()
        self.short_tail: tuple[int, Looks] | None = None
        self.name: str | None = None
        self.compared: set[str] = set()
        self._track: Track | None = None
        self._found = self._lost = 0
        #: Modes in which a run was watched, and that of the latest one.
        self._modes: set[bool] = set()
        self._drawn: tuple[Any, ...] = ()
        self._mode = True
        _everyone.add(self)

    def look(self, root: Any) -> Noted:
        """The state of a region now."""
        if not isinstance(root, nn.Module):  # a partial or a method leads to more than its module
            return Searched(Holders(root, *self.generators))
        self._mode = root.training
        self.watched = self._mode in self._modes
        if not self.watched:
            self.generators, self._track = global_generators(), None
        found = None if self._track is None else self._track.found()
        if found is not None:
            self._found += 1
            return found
        holders = Holders(root, *self.generators)
        # What moves on in every run is not worth a second search.
        worth = self.watched and self._lost < self._found + _PATIENCE
        self._track = track_of(holders) if worth else None
        self._lost += worth
        return Searched(holders)

    def ends_shortly(self, looks: list[Looks]) -> bool:
        """Whether little is left to be run after values that look like that."""
        return self.short_tail == (len(looks), looks[-1])

    def learnt(self, quiet: bool, generators: tuple[Any, ...]) -> None:
        """Note what a run that was looked at has done."""
        first = not self._modes
        self._modes.add(self._mode)
        self.watched, self.quiet = True, quiet and (first or self.quiet)
        drawn = {id(one): one for one in (*self._drawn, *generators)}
        self.generators = self._drawn = tuple(drawn.values())
        self._track = None

    def watch_again(self) -> None:
        """Look at the next run: what this one has told of those before it was not all."""
        self.watched = False
        self._modes.clear()


#: One region is an error when it overwrites what it did not before; others like it learn from that.
_everyone: weakref.WeakSet[Known] = weakref.WeakSet()


def watch_all_again() -> None:
    """Look at the next run of every region."""
    for known in tuple(_everyone):
        known.watch_again()
