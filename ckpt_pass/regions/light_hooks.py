"""Take the place of torch's saved-tensor hooks inside one of its checkpoint regions.

``torch.utils.checkpoint`` makes an object, a weak reference and a description for each value that
autograd saves in a region, and as much again when it recomputes. Here a region's values are counted
by our own hooks, on top of torch's, and torch sees one single value: asking for it starts torch's
recomputation, and its being recomputed ends that. Random state, autocast, early stop and repeated
backwards stay torch's.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler import record_function

from ckpt_pass._torch import autograd, functorch
from ckpt_pass.regions.ambient import BARE, Surroundings
from ckpt_pass.regions.arguments import Copier
from ckpt_pass.regions.outside import Outside
from ckpt_pass.regions.saved_values import Recomputation, SavedLooks
from ckpt_pass.regions.writes import WriteWatch, known_of

#: The value that torch sees; any does. Made once, so that no mode around a region sees it made.
_VALUE = torch.empty(0)


class LightHooks:
    """What the forward of one region and its recomputations share.

    Torch's frame of the region holds the recomputation's mode, which holds this. So nothing here
    refers to that frame: what autograd saves does, and the frame goes with it.
    """

    __slots__ = (
        "_checked",
        "_complete",
        "_end",
        "_in_use",
        "_range",
        "_rerun",
        "_saved",
        "_stops_early",
        "_surroundings",
        "_undo",
        "name",
        "outside",
        "store",
        "watch",
    )

    def __init__(self) -> None:
        self._saved = SavedLooks()
        #: Recomputed values, each until it is taken.
        self.store: list[torch.Tensor | None] = []
        self._rerun: Recomputation | None = None
        #: What tells torch that all is there, where the recomputation runs to its end.
        self._end: Callable[[], Any] | None = None
        self._in_use = False
        #: For messages and profilers.
        self.name = "a checkpoint region"
        self._range: record_function | None = None
        self._complete = False
        self._checked = True
        self._stops_early = True
        self._surroundings: Surroundings | None = None
        self._undo: contextlib.ExitStack | None = None
        #: What the region reads besides its arguments.
        self.outside: Outside | None = None
        #: Looks for what its forward overwrites, the first time.
        self.watch: WriteWatch | None = None

    def enter_forward(self) -> bool:
        """Push hooks, if those below are torch's for a region; return whether they were.

        Not where calls are written down for a graph that has no recomputation: torch's hooks are
        called here, and what they call would stay in it.
        """
        if functorch.traces_before_autograd():
            return False
        hooks = autograd.saved_hooks()
        frame = autograd.frame_of_checkpoint(hooks[0]) if hooks else None
        if hooks is None or frame is None:
            return False
        self._stops_early = bool(frame.early_stop)
        self._in_use = True
        self._surroundings = Surroundings(BARE)
        self._look_around(frame)
        asked = _asking(self, frame, hooks[1], hooks[0](_VALUE))
        # What torch has noted of our value, if it checks any.
        self._checked = frame.metadata_fn is None or frame.x_metadatas[-1] is not None
        autograd.push_saved_hooks(self._saved.pack, asked)
        return True

    def _look_around(self, frame: Any) -> None:
        fn = autograd.function_of_checkpoint(frame)
        others = autograd.arguments_of_checkpoint(frame)
        known = known_of(fn, *others)
        if known.name is None:
            known.name = _name_of(fn)
        self.name = known.name or self.name
        self.outside = Outside(fn, known)
        if others:
            copier = Copier(self.outside.has)
            autograd.convert_arguments(frame, copier)
            if copier.mutable:
                self.outside.add(*copier.mutable)
        self.watch = None if known.watched else WriteWatch(self.outside)

    def exit_forward(self) -> None:
        """Pop them; what a backward inside the region had made and left is let go."""
        self._complete = True
        self.store = []
        autograd.pop_saved_hooks()
        if self.outside is not None:
            self.outside.end_histories()
            if self.watch is not None:
                self.outside.learn()
                self.watch = None
            self.outside.check_iterators()

    def enter_recompute(self) -> bool:
        """Push hooks that collect the values; return whether torch recomputes for them."""
        hooks = autograd.saved_hooks()
        if not self._in_use or hooks is None:
            return False
        if functorch.profiler_is_running():
            self._range = record_function(f"recompute {self.name}")
            self._range.__enter__()
        pack = hooks[0]
        self.store = []
        if self._surroundings is not None and self._surroundings.changed():
            self._undo = contextlib.ExitStack()
            self._surroundings.restore(self._undo)
        # Torch ends the recomputation when it has the one value that it knows of.
        end = functools.partial(pack, _VALUE)
        to_end = self.outside is not None and self.outside.known.fills
        self._end = end if to_end else None
        complete = _go_on if to_end else end
        self._rerun = Recomputation(self.name, self._saved.looks, complete, self._checked)
        autograd.push_saved_hooks(self._rerun.pack, self._rerun.unpack)
        return True

    def exit_recompute(self, failed: bool) -> None:
        """Pop them; what was collected is there for the backward, if it is all that it needs.

        Raises:
            RecomputeMismatchError: less was saved than in the forward, or more in a run to the end.
        """
        autograd.pop_saved_hooks()
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None
        if self._undo is not None:
            self._undo.close()
            self._undo = None
        assert self._rerun is not None
        rerun, self._rerun = self._rerun, None
        made = rerun.handed_over()
        if rerun.is_complete:  # torch's early stop is an error here too
            self.store = made
        end, self._end = self._end, None
        if not failed:
            rerun.check_count(exactly=self._complete and not self._stops_early)
            if end is not None:
                end()


def _go_on() -> None:
    pass


def _name_of(fn: Any) -> str:
    """A module's class, a function's name."""
    fn = getattr(fn, "func", fn)  # of a partial
    owner = getattr(fn, "__self__", fn)
    if isinstance(owner, nn.Module):
        return type(owner).__name__
    return str(getattr(fn, "__qualname__", ""))


def _asking(
    hooks: LightHooks, frame: Any, unpack_of_torch: Any, holder: Any
) -> Callable[[int], torch.Tensor]:
    """The hook that autograd calls for a saved value: it starts torch's recomputation."""

    def unpack(number: int) -> torch.Tensor:
        store = hooks.store
        value = store[number] if number < len(store) else None
        if value is None:  # not yet recomputed, or used by a backward before this one
            autograd.recompute_anew(frame)
            unpack_of_torch(holder)
            store = hooks.store
            value = store[number]
            assert value is not None
        store[number] = None
        return value

    return unpack
