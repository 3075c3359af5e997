"""What earlier runs of a region have told, so that later ones need not look at every op."""

from __future__ import annotations

from typing import Any

from torch import nn

from ckpt_pass.regions.contents import Contents
from ckpt_pass.regions.holders import Holders
from ckpt_pass.state.objects import global_generators


class Known:
    """What earlier runs of a region have told.

    Attributes:
        watched: whether a run was looked at, op by op.
        quiet: whether that run has left everything as it was.
        overwritten: names of the tensors that the region overwrites, as :meth:`Outside.name_of`
            gives them.
        repointed: of those that it makes look at other memory (``tensor.data = ...``).
        generators: those of the global random generators that it draws from; all of them until
            that is known.
        name: of the module's class or of the function, once it is needed.
        options: for whoever runs the region: how it runs where nothing else is asked for.
    """

    __slots__ = (
        "__weakref__",
        "_contents",
        "_holders",
        "_keeps",
        "generators",
        "name",
        "options",
        "overwritten",
        "quiet",
        "repointed",
        "watched",
    )

    def __init__(self, root: nn.Module | None = None) -> None:
        self.watched = False
        self.quiet = False
        self.overwritten: set[str] = set()
        self.repointed: set[str] = set()
        self.generators = global_generators()
        self.name: str | None = None
        self.options: Any = None
        self._keeps = root is not None
        self._holders: Holders | None = None
        self._contents: Contents | None = None

    def let_go(self) -> None:
        """Hold nothing that may lead to the module."""
        self._holders = self._contents = self.options = None

    def look(self, root: Any) -> tuple[Holders, Contents]:
        """The holders of a region's state, and what they hold now."""
        holders, contents = self._holders, self._contents
        if holders is None or contents is None or not contents.held_by(holders):
            holders = Holders(root, *self.generators)
            contents = Contents(holders)
            # What is kept here lives on: never values of a step, nor buffers that are replaced.
            lasts = self._keeps and holders.lasting
            lasts = lasts and (self.quiet or not holders.buffers)
            if lasts and all(tensor.is_leaf for tensor in holders.tensors):
                self._holders, self._contents = holders, contents
            else:
                self._holders = self._contents = None
        return holders, contents

    def learnt(self, quiet: bool, generators: tuple[Any, ...]) -> None:
        """Note what a run that was looked at has done."""
        self.watched, self.quiet, self.generators = True, quiet, generators
        self._holders = self._contents = None
