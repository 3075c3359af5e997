"""Families of models as people train them: tiny sizes, random weights, nothing downloaded.

A :class:`Family` builds a training step from nothing, in train mode and with the defaults of its
library (dropout on, caches on). ``FAMILIES`` holds all of them by name. They are tried in six ways
(:mod:`tests.zoo.families.ways`), each in a process of its own:

    python -m tests.zoo.families bart              # one family, one line of JSON a way
    python -m tests.zoo.families --table FILE.md   # all of them, as the page in the documentation
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Batch: TypeAlias = Mapping[str, Any]
"""The keyword arguments of one step."""

WIDTH = 32
HEADS = 4
LAYERS = 4
VOCAB = 128
LABELS = 10
ROWS, LENGTH = 2, 32


@dataclass(frozen=True)
class Family:
    """One training step.

    Attributes:
        name: of the family.
        kind: text, vision, speech, state-space, mixture, diffusion, series, own.
        library: the package that it comes from.
        build: makes a module whose forward returns the loss, and the arguments of one call.
        odd: why it is among those that run in every test run; empty for the others.
    """

    name: str
    kind: str
    library: str
    build: Callable[[], tuple[nn.Module, Batch]]
    odd: str = ""

    def make(self) -> tuple[nn.Module, Batch]:
        """The same module and arguments at every call; the global random state is left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(20)
            module, batch = self.build()
        return module.train(), batch

    def __str__(self) -> str:
        return self.name


class Step(nn.Module):
    """A model that is called by keywords, and its loss: the model's own, or a mean square."""

    def __init__(self, model: nn.Module, output: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, **batch: Any) -> Tensor:
        """Scalar loss."""
        found = self.model(**batch)
        if self.output is not None:
            found = self.output(found)
        if isinstance(found, Tensor):
            return found if found.ndim == 0 else found.float().square().mean()
        loss: Tensor | None = getattr(found, "loss", None)
        return found[0].float().square().mean() if loss is None else loss.reshape(())


def tokens(length: int = LENGTH, rows: int = ROWS) -> Tensor:
    """Token ids [rows, length] without special ones."""
    return torch.randint(5, VOCAB, (rows, length))


def pictures(size: int, rows: int = ROWS, channels: int = 3) -> Tensor:
    """Images [rows, channels, size, size]."""
    return torch.randn(rows, channels, size, size)
