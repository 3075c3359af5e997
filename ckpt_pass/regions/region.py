"""What one checkpoint region keeps between its forward and its recomputation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointError

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch import storages
from ckpt_pass.offloading.options import Offload
from ckpt_pass.offloading.stores import OffloadLike
from ckpt_pass.offloading.window import AHEAD, Window
from ckpt_pass.ops.taxonomy import op_name
from ckpt_pass.policy.sites import output_tensors
from ckpt_pass.regions.draws import Draw

# What torch says of the same, for code that looks for its words (``torch.utils.checkpoint``).
EXTRA_BACKWARD = (
    "Trying to backward an extra time. You are only allowed to backward once on any region "
    "computed under selective activation checkpoint."
)
MUTATED = "Tensor cached during selective activation checkpoint has been mutated"
NOT_IN_STORAGE = "encountered during backward but not found in storage."
OTHER_NUMBER = (
    "torch.utils.checkpoint: A different number of tensors was saved during the original forward "
    "and recomputation."
)
MORE_SAVED = (
    "torch.utils.checkpoint: trying to save more tensors during recomputation than during the "
    "original forward pass."
)
OTHER_METADATA = (
    "torch.utils.checkpoint: Recomputed values for the following tensors have different metadata "
    "than during the forward pass."
)


class RecomputeMismatchError(CkptPassError, CheckpointError):
    """The recomputation ran other ops than the forward; torch's ``CheckpointError`` too."""


class BackwardTwiceError(CkptPassError, CheckpointError):
    """A second backward needs values that the first one has used up; torch: ``RuntimeError``."""


class MutatedActivationError(CkptPassError, CheckpointError):
    """A saved value was changed in place after its region had ended; torch: ``RuntimeError``."""


def changed_in_place(name: str) -> str:
    """What is said of a saved output that was changed."""
    return (
        f"{MUTATED}: the saved output of {name} was changed in place after its checkpoint region "
        "had ended, so the backward would see the changed values. Clone it before the in-place "
        "op, or let the policy recompute this op."
    )


def _versions(value: Any) -> int | tuple[int, ...]:
    if isinstance(value, torch.Tensor):
        return storages.version_of(value)
    return tuple(storages.version_of(tensor) for tensor in output_tensors(value))


class Saved:
    """One saved output: aliases of its tensors, and their versions when they were saved."""

    __slots__ = ("_draw", "_value", "_versions", "taken")

    def __init__(self, output: Any, draw: Draw | None = None) -> None:
        self.taken = False
        self._draw = draw
        if isinstance(output, torch.Tensor):  # nearly always: no pytree for one tensor
            alias = storages.shared_alias(output)
            self._value: Any = alias
            self._versions: int | tuple[int, ...] = storages.version_of(alias)
        else:
            self._hold(tree_map_only(torch.Tensor, storages.shared_alias, output))

    def _hold(self, value: Any) -> None:
        self._value = value
        self._versions = _versions(value)

    def settle(self) -> None:
        """Take the versions as they are now.

        Autograd counts an in-place op's change after the op has returned to it, that is after a
        dispatch mode has seen the result; so versions are taken again when the next op comes.
        """
        self.recount()

    def recount(self) -> None:
        """Take the versions as they are now, after a change that changed no value."""
        self._versions = _versions(self._value)

    def storages(self) -> Iterator[int]:
        """The storages that this output holds."""
        for tensor in output_tensors(self._value):
            yield tensor.untyped_storage()._cdata

    def copy(self) -> None:
        """Hold copies from now on; called just before an op overwrites the originals."""
        self._hold(tree_map_only(torch.Tensor, torch.clone, self._value))

    def take(self, op: Any, again: bool = False) -> Any:
        """Hand the value out, once.

        Args:
            op: what made it.
            again: whether it will be asked for again: by the recomputation after its forward.

        Raises:
            BackwardTwiceError: it was handed out before.
            MutatedActivationError: it was changed in place in the meantime.
        """
        if self.taken:
            raise BackwardTwiceError(
                f"{EXTRA_BACKWARD} The saved output of {op_name(op)} is needed by a second "
                "backward through a checkpoint region, but the first backward has used it. Call "
                "backward once for each forward; retain_graph=True does not keep a region's saved "
                "values."
            )
        if _versions(self._value) != self._versions:
            raise MutatedActivationError(changed_in_place(op_name(op)))
        value = self._value
        if self._draw is not None:
            self._draw.skip()
        if not again:
            self._value, self._draw, self.taken = None, None, True
        return value


class Reshaped:
    """Saved outputs of which an op such as ``transpose_`` changes how they lie, and no value.

    What is held is an alias that lies as before; autograd counts the change all the same.
    """

    def __init__(self, entries: list[Saved]) -> None:
        self._entries = entries

    def settle(self) -> None:
        """Take the versions as they are, now that autograd has counted (:meth:`Saved.settle`)."""
        self.recount()

    def recount(self) -> None:
        """Take the versions as they are now."""
        for entry in self._entries:
            entry.recount()


class RegionMemory:
    """The saved outputs of one region, by op (a key of its) and occurrence.

    Only ops of which something was saved are counted: the others may run in different numbers in
    forward and recomputation (autocast casts a shared weight once, or twice) and do no harm.
    """

    __slots__ = (
        "_ahead",
        "_by_storage",
        "_offload",
        "_seen",
        "_unindexed",
        "compared",
        "complete",
        "entries",
        "name",
        "window",
    )

    def __init__(
        self,
        offload: OffloadLike | None = None,
        ahead: int = AHEAD,
        name: str = "a region",
        compared: set[str] | None = None,
    ) -> None:
        #: The region's, for messages; and what ranks have compared of what it keeps in parts.
        self.name = name
        self.compared: set[str] = set() if compared is None else compared
        self._offload = offload
        self._ahead = ahead
        #: What is put away; ``None`` as long as nothing is.
        self.window: Window | None = None
        #: Whether the region's forward has ended. Until then a backward inside it may make it run
        #: again as far as it has come, and what is handed out stays for the next time.
        self.complete = True
        #: By op, in order; ``None`` for what was not saved. Only ops in here are counted.
        self.entries: dict[Any, list[Saved | None]] = {}
        self._by_storage: dict[int, list[Saved]] = {}
        self._unindexed: list[Saved] = []
        self._seen: dict[Any, int] = {}

    def keep(self, key: Any, output: Any, draw: Draw | None = None) -> Saved:
        """Save an output (and what was drawn for it) as the next occurrence of ``key``."""
        # Not by way of `add`: this comes for every op that is saved.
        entry = Saved(output, draw)
        entries = self.entries.get(key)
        if entries is None:
            self.entries[key] = [entry]
        else:
            entries.append(entry)
        self._unindexed.append(entry)
        return entry

    def add(self, key: Any, entry: Saved) -> Saved:
        """Take what was saved as the next occurrence of ``key``."""
        entries = self.entries.get(key)
        if entries is None:
            self.entries[key] = [entry]
        else:
            entries.append(entry)
        self._unindexed.append(entry)
        return entry

    def window_for_more(self) -> Window:
        """What puts values away; made with the first of them."""
        if self.window is None:
            where = Offload() if self._offload is None else self._offload
            self.window = Window(where, ahead=self._ahead)
        return self.window

    def skip(self, key: Any) -> None:
        """Count an occurrence of ``key`` that is not saved."""
        self.entries.setdefault(key, []).append(None)

    def next_of(self, op: Any, key: Any) -> str:
        """The output that is saved next, in words: the same on all ranks that run the same."""
        number = len(self.entries.get(key, ())) + 1
        return f"the output of {op_name(op)} (execution {number}) in {self.name}"

    def about_to_change(self, tensors: Iterator[torch.Tensor]) -> None:
        """Copy what is saved of tensors that an op is about to overwrite."""
        self._index()
        for tensor in tensors:
            for entry in self._by_storage.pop(tensor.untyped_storage()._cdata, ()):
                entry.copy()
                self._unindexed.append(entry)  # a run inside the forward may write to the copy

    def reshaped(self, tensors: Iterator[torch.Tensor]) -> Reshaped:
        """What is saved of tensors that an op has made lie otherwise."""
        self._index()
        addresses = [tensor.untyped_storage()._cdata for tensor in tensors]
        return Reshaped([e for address in addresses for e in self._by_storage.get(address, ())])

    def _index(self) -> None:
        for entry in self._unindexed:  # looked up only here: most regions overwrite nothing
            for storage in entry.storages():
                self._by_storage.setdefault(storage, []).append(entry)
        self._unindexed.clear()

    def start_recompute(self) -> None:
        """Count occurrences from the beginning again."""
        self._seen.clear()
        if self.window is not None:
            self.window.fetch_from_the_first()
        if self.complete:
            self._by_storage.clear()
            self._unindexed.clear()

    def next(self, key: Any, op: Any) -> Saved | None:
        """The next occurrence of ``key``; ``None`` where it was not saved, nor any other of it.

        Raises:
            RecomputeMismatchError: the forward ran the op less often.
        """
        entries = self.entries.get(key)
        if entries is None:
            return None
        index = self._seen.get(key, 0)
        self._seen[key] = index + 1
        if index >= len(entries):
            raise RecomputeMismatchError(
                f"{op_name(op)} invocation index {index} {NOT_IN_STORAGE} "
                f"The recomputation of a checkpoint region runs {op_name(op)} {index + 1} times or "
                f"more, but its forward ran it {len(entries)} times. Expected the "
                "same ops in both: look for code that depends on global state, on a counter, or "
                "on values that changed between forward and backward."
            )
        return entries[index]
