"""Take the place of torch's saved-tensor hooks inside one of its checkpoint regions.

``torch.utils.checkpoint`` makes an object, a weak reference and a description for each value that
autograd saves in a region, and as much again when it recomputes. Here a region's values are counted
by our own hooks, on top of torch's, and torch sees one single value: asking for it starts torch's
recomputation, and its being recomputed ends that. Random state, autocast, early stop and repeated
backwards stay torch's.
"""

from __future__ import annotations

from typing import Any

import torch

from ckpt_pass import _torch_autograd
from ckpt_pass.eager.saved_values import Recomputation, SavedShapes

_NAME = "a checkpoint region"
#: The value that torch sees; any does. Made once, so that no mode around a region sees it made.
_VALUE = torch.empty(0)


class LightHooks:
    """What the forward of one region and its recomputations share."""

    __slots__ = ("_checked", "_holder", "_rerun", "_saved", "_store", "_unpack_of_torch")

    def __init__(self) -> None:
        self._saved = SavedShapes()
        self._store: list[torch.Tensor | None] = []
        self._rerun: Recomputation | None = None
        self._unpack_of_torch: Any = None
        self._holder: Any = None
        self._checked = True

    def enter_forward(self) -> bool:
        """Push hooks, if those below are torch's for a region; return whether they were."""
        hooks = _torch_autograd.saved_hooks()
        frame = _torch_autograd.frame_of_checkpoint(hooks[0]) if hooks else None
        if hooks is None or frame is None:
            return False
        self._checked = frame.metadata_fn is None or frame.metadata_fn(_VALUE) is not None
        self._holder = hooks[0](_VALUE)
        self._unpack_of_torch = hooks[1]
        _torch_autograd.push_saved_hooks(self._saved.pack, self._unpack)
        return True

    def exit_forward(self) -> None:
        """Pop them."""
        _torch_autograd.pop_saved_hooks()

    def _unpack(self, number: int) -> torch.Tensor:
        value = self._store[number] if number < len(self._store) else None
        if value is None:  # not yet recomputed, or used by a backward before this one
            self._unpack_of_torch(self._holder)
            value = self._store[number]
            assert value is not None
        self._store[number] = None
        return value

    def enter_recompute(self) -> bool:
        """Push hooks that collect the values; return whether torch recomputes for them."""
        hooks = _torch_autograd.saved_hooks()
        if self._holder is None or hooks is None:
            return False
        pack = hooks[0]
        self._rerun = Recomputation(_NAME, self._saved.shapes, lambda: pack(_VALUE), self._checked)
        _torch_autograd.push_saved_hooks(self._rerun.pack, self._rerun.unpack)
        return True

    def exit_recompute(self, failed: bool) -> None:
        """Pop them; what was collected is there for the backward.

        Raises:
            RecomputeMismatchError: less was saved than in the forward.
        """
        _torch_autograd.pop_saved_hooks()
        assert self._rerun is not None
        self._store, rerun, self._rerun = self._rerun.store, self._rerun, None
        if not failed:
            rerun.check_count()
