"""A dispatch mode that watches a step's ops, and looks aside while it runs ops of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch.utils._python_dispatch import TorchDispatchMode


class Watcher(TorchDispatchMode):
    """The base of what records or counts ops; its ``__torch_dispatch__`` asks ``_resting``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._resting = False

    @contextlib.contextmanager
    def _rest(self) -> Iterator[None]:
        """Inside, ops are the watcher's own."""
        before, self._resting = self._resting, True
        try:
            yield
        finally:
            self._resting = before
