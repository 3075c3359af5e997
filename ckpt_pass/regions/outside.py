"""What a region reads besides its arguments, put back for the time of its recomputation.

A recomputation must read what the forward read. So the holders of a region's state (attributes,
parameters, buffers, hooks, containers, closures, globals) are copied, one level each and by
reference, when the forward begins. For the recomputation they hold that again, and afterwards what
they held before it. Tensors that were changed in place are another matter: what the forward itself
is known to overwrite is copied before it does, and stands in for the tensor in the recomputation;
so does the memory that a tensor looked at, where it looks at other memory now. Whatever else has
changed is an error with the tensor's name.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch import autograd
from ckpt_pass._torch.histories import has_history, over_other_memory
from ckpt_pass.regions.behind import modules_behind
from ckpt_pass.regions.buffers import alias_like, copy_of, has_statistics, running_buffers
from ckpt_pass.regions.histories import Histories, leads_to_history, recomputations
from ckpt_pass.regions.holders import Holders, has_memory
from ckpt_pass.regions.known import Known, watch_all_again
from ckpt_pass.regions.naming import name_of
from ckpt_pass.regions.noted import Noted, Searched
from ckpt_pass.regions.stand_ins import held_now, put_in_place
from ckpt_pass.regions.switched import Switched, switch_flags
from ckpt_pass.state.objects import SpentIteratorError


class MutatedStateError(CkptPassError, RuntimeError):
    """What a region reads was changed in place before its recomputation; torch: ``RuntimeError``.

    A parameter, a buffer, or a tensor on an attribute, in a container, closure or global.
    """


Look = tuple[int, bool]

_address = torch.Tensor.data_ptr
_stride = torch.Tensor.stride
_version_in, _flag = operator.itemgetter(0), operator.itemgetter(1)
_look: Callable[[torch.Tensor], Look] = operator.attrgetter("_version", "requires_grad")


class Outside:
    """The state around one run of a region.

    Args:
        root: the region's module or function.
        known: what earlier runs have told.
    """

    __slots__ = (
        "__weakref__",
        "_addresses",
        "_arguments",
        "_before",
        "_copies",
        "_looks",
        "_roots",
        "_start_by_id",
        "_starts",
        "_state",
        "_statistics",
        "_switched",
        "changed_anew",
        "histories",
        "known",
        "stand_ins",
        "suspects",
    )

    def __init__(self, root: Any, known: Known) -> None:
        self._roots: tuple[Any, ...] = (root,)
        self.known = known
        self._state = known.look(root)
        #: What tensors looked at when the forward began: aliases keep it.
        self._starts: list[torch.Tensor] = []
        self._start_by_id: dict[int, torch.Tensor] | None = None
        #: Copies of storages as they were when the forward began, by the storage's address.
        self._copies: dict[int, torch.UntypedStorage] = {}
        #: Storages that the forward has changed, and were not held when it began, by address;
        #: while they are referred to, what is made after them does not get their addresses.
        self.changed_anew: dict[int, StorageWeakRef] = {}
        #: Running statistics, which most regions move and do not read.
        self._statistics: list[torch.Tensor] = []
        self._before: Noted | None = None
        self._arguments: Any = None
        #: What :meth:`put_in` has found besides.
        self._switched: Switched | None = None
        #: The storages of what stands in for what the forward has overwritten, by address.
        self.stand_ins: frozenset[int] = frozenset()
        #: What has moved and has no copy, by its storage: the recomputation must not read it.
        self.suspects: dict[int, torch.Tensor] = {}
        #: What has a history, of the tensors.
        self.histories: Histories | None = None
        self._note_tensors()

    def add(self, *arguments: Any) -> None:
        """Hold what arguments lead to as well."""
        self._roots += arguments
        self._state = Searched(Holders(*self._roots, *self.known.generators))
        self._note_tensors()

    def _note_tensors(self) -> None:
        known, state = self.known, self._state
        #: How often each tensor was written to, and whether it requires a gradient.
        self._looks = _looks_of(state.tensors)
        if state.norms and (known.reads_statistics or not known.watched):
            self._statistics = list(running_buffers(self.owners_of_statistics()))
        if known.reads_statistics:
            for tensor in self._statistics:
                self.about_to_change(tensor)
        if known.overwritten:
            for tensor in self.storages().values():
                if self.name_of(tensor) in known.overwritten:
                    self.about_to_change(tensor)
        movable = state.movable()
        self._starts, self._addresses = autograd.data_of_all(movable), list(map(_address, movable))
        self._start_by_id = None
        self._note_histories(state.histories())

    def note_arguments(self, arguments: Any, inside: list[torch.Tensor]) -> None:
        """Know what holds the region's arguments, and the tensors in containers among them."""
        self._arguments = arguments
        self._note_histories(list(filter(has_history, inside)))

    def _note_histories(self, found: list[torch.Tensor]) -> None:
        if found and self.histories is None:
            self.histories = Histories(self, found)
        elif found and self.histories is not None:
            self.histories.add(found)

    def found(self) -> tuple[Any, ...]:
        """What holds all that the forward found when it began, and nothing else does."""
        return self._state, self.histories, self._roots, self._arguments

    def end_histories(self) -> None:
        """The forward has ended, with an error or without."""
        if self.histories is not None:
            self.histories.end()
        elif self.known.quiet or self._state.is_still_held():
            return
        elif leads_to_history(self._state.holders.containers()):
            self.histories = Histories(self, [])

    def given(self) -> tuple[Any, ...]:
        """Of what :meth:`found` returns, what holds the arguments."""
        return self._roots[1:], self._arguments

    def learn(self) -> None:
        """Let later runs know what the forward has done, which was looked at and ends now."""
        known, state = self.known, self._state
        for tensor in state.tensors:
            self.about_to_read(tensor)
        if not known.reads_statistics:
            for tensor in self._statistics:
                self._copies.pop(tensor.untyped_storage()._cdata, None)
        known.overwritten.update(self.overwritten())
        if self.changed_anew and not state.is_still_held():
            known.overwritten.update(self._made_and_changed())
        quiet = not self._tensors_moved(_looks_of(state.tensors)) and state.is_still_held()
        if state.holders.seeds:  # it may move what it leaves as it was
            known.draws = True
            known.learnt(False, known.generators)
            return
        moved = {id(value) for value, _, _ in state.contents.moved(state.holders)}
        known.learnt(quiet, tuple(g for g in known.generators if id(g) in moved))

    def owners_of_statistics(self, *arguments: Any) -> tuple[nn.Module, ...]:
        """The modules that the region runs, as far as they have running statistics.

        Args:
            arguments: the region's own: a function may run a module among them.
        """
        root = self._roots[0]
        if isinstance(root, nn.Module):
            return (root,) if self._state.norms and has_statistics(root) else ()
        return tuple(filter(has_statistics, modules_behind(*self._roots, *arguments)))

    def check_iterators(self) -> None:
        """Raise where the forward, which ends now, has moved what cannot be moved back.

        Raises:
            SpentIteratorError: it has.
        """
        if not self._state.objects:
            return
        for thing, keeper, _ in self._state.contents.moved(self._state.holders):
            if keeper.write is None and keeper.copy is None:
                raise SpentIteratorError(
                    f"{self.name_of(thing)} (a {type(thing).__name__}) has moved on in the forward "
                    "of a checkpoint region, and cannot be moved back for its recomputation, which "
                    "would take other values from it. Expected the same values in both. Count in "
                    "an attribute, take the value before the region and pass it in, or take the "
                    "module out of the region."
                )

    def has(self, container: Any) -> bool:
        """Whether a container's contents are put back."""
        return self._state.holders.has(container)

    def storages(self) -> dict[int, torch.Tensor]:
        """One tensor for each storage that is held, by the storage's address."""
        found = filter(has_memory, (*self._state.tensors, *self._statistics))
        return {t.untyped_storage()._cdata: t for t in found}

    def about_to_change(self, tensor: torch.Tensor) -> None:
        """Copy the storage of a tensor that the forward overwrites; once."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._copies:
            self._copies[storage._cdata] = copy_of(storage)

    def overwritten(self) -> Iterator[str]:
        """The names of the tensors that are copied."""
        for tensor in self._state.tensors:
            if self._copied(tensor) is not None:
                yield self.name_of(tensor)

    def _made_and_changed(self) -> Iterator[str]:
        """The names of the tensors that the forward has made, let be held, and overwritten."""
        now = Searched(Holders(*self._roots))
        for tensor in filter(has_memory, now.tensors):
            if tensor.untyped_storage()._cdata in self.changed_anew:
                yield name_of(tensor, self._roots, now.holders, now.contents)

    def about_to_read(self, tensor: torch.Tensor) -> None:
        """Note where the forward has made a tensor look at other memory."""
        if self._looks_elsewhere(tensor):
            self.known.repointed.add(self.name_of(tensor))

    def _start(self, tensor: torch.Tensor) -> torch.Tensor | None:
        found = self._start_by_id
        if found is None:
            tensors = map(id, self._state.movable())
            found = self._start_by_id = dict(zip(tensors, self._starts, strict=True))
        return found.get(id(tensor))

    def _looks_elsewhere(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor looks at other memory than when the forward began (``.data = ...``).

        Or at the same in another way, as a transposed view of it does.
        """
        start = self._start(tensor)
        if start is None:
            return False
        if start.data_ptr() == tensor.data_ptr() and start.stride() == tensor.stride():
            return False
        # Sharded training gives parameters their memory, of another size, for a while.
        is_there = start.numel() > 0 and start.untyped_storage().nbytes() > 0
        return is_there or not isinstance(tensor, nn.Parameter)

    def _tensors_moved(self, looks: list[Look]) -> bool:
        """Whether anything has become of the tensors, which look so now, since the forward began.

        A switched flag alone is nothing.
        """
        if self._copies or self.known.repointed:
            return True
        if looks != self._looks and list(map(_version_in, looks)) != list(
            map(_version_in, self._looks)
        ):
            return True
        movable = self._state.movable()
        if list(map(_address, movable)) == self._addresses and (
            list(map(_stride, movable)) == list(map(_stride, self._starts))
        ):
            return False
        return any(map(self._looks_elsewhere, movable))

    def _copied(self, tensor: torch.Tensor) -> torch.UntypedStorage | None:
        if not self._copies or not has_memory(tensor):
            return None
        return self._copies.get(tensor.untyped_storage()._cdata)

    def put_in(self, differentiable: bool = False) -> bool:
        """Make the holders hold what the forward began with; :meth:`put_back` ends that.

        Args:
            differentiable: whether the recomputation's own history is differentiated.

        Returns:
            Whether nothing has changed, nor does the region change anything, or call hooks.

        Raises:
            MutatedStateError: a tensor has other values now, and no copy of it is there.
        """
        recomputations.begin()
        try:
            return self._put_in(differentiable)
        except BaseException:
            try:
                if self._before is not None:
                    self._put_back()
            finally:
                recomputations.end()
            raise

    def _put_in(self, differentiable: bool) -> bool:
        state = self._state
        looks = _looks_of(state.tensors)
        self._switched = Switched(state.tensors, list(map(_flag, looks)))
        moved = self._tensors_moved(looks)
        if looks != self._looks:
            switch_flags(state.tensors, map(_flag, self._looks))
        if not moved and state.is_still_held():
            # What a run moves and moves back is left between where the recomputation stops early.
            self._before = state
            return self.known.quiet and state.has_no_hooks
        self.known.quiet = False
        holders = state.holders
        self._before = Searched(holders)
        state.contents.put_into(holders)
        stand_ins = self._copied_iterators() if state.objects else {}
        if moved:
            stand_ins |= self._substitutes(differentiable)
        if stand_ins:
            put_in_place(stand_ins, self._state.holders)
        return False

    def _copied_iterators(self) -> dict[int, Any]:
        """Iterators that have moved on, by their id, and what takes their places."""
        return {
            id(thing): keeper.copy(state)
            for thing, keeper, state in self._state.contents.moved(self._state.holders)
            if keeper.copy is not None
        }

    def put_back(self) -> None:
        """Make the holders hold what they held before :meth:`put_in`."""
        try:
            self._put_back()
        finally:
            recomputations.end()

    def _put_back(self) -> None:
        before, self._before = self._before, None
        if self.stand_ins or self.suspects:
            self.stand_ins, self.suspects = frozenset(), {}
        switched, self._switched = self._switched, None  # or it holds the tensors, too
        if switched is not None:
            switched.put_back()
        if before is not None and not before.is_still_held():
            self.known.quiet = False
            before.contents.put_into(before.holders)

    def _substitutes(self, differentiable: bool) -> dict[int, Any]:
        """What takes the places of tensors that were changed in place, by their id."""
        copies = {address: copy_of(storage) for address, storage in self._copies.items()}
        self.stand_ins = frozenset(copied._cdata for copied in copies.values())
        stand_ins: dict[int, Any] = {}
        present = {id(value) for value in held_now(self._state.holders)}
        for tensor in self._statistics:
            if id(tensor) in present and tensor.untyped_storage()._cdata in copies:
                stand_ins[id(tensor)] = alias_like(
                    tensor, tensor, copies[tensor.untyped_storage()._cdata]
                )
        for tensor, (version, _) in zip(self._state.tensors, self._looks, strict=True):
            if id(tensor) not in present or id(tensor) in stand_ins:
                continue
            start = self._start_of(tensor)
            address = start.untyped_storage()._cdata if has_memory(start) else 0
            copied = copies.get(address)
            if copied is None and start is not tensor and self._kept(tensor, version):
                copied = start.untyped_storage()
            if copied is not None and start is tensor and _is_as_made(tensor, version):
                alias = functools.partial(_memory_of, tensor, copied)
                stand_ins[id(tensor)] = over_other_memory(tensor, alias)
            elif copied is not None and not (differentiable and tensor.requires_grad):
                stand_ins[id(tensor)] = alias_like(tensor, start, copied)
            elif _version(tensor) != version or copied is not None:
                if not address:
                    raise self._moved(tensor)
                self.suspects[tensor.untyped_storage()._cdata] = tensor
        return stand_ins

    def _kept(self, tensor: torch.Tensor, version: int) -> bool:
        """Whether the memory that a tensor looked at surely holds what it held."""
        return _version(tensor) == version or self.name_of(tensor) in self.known.repointed

    def _start_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """What a tensor was when the forward began, if the forward makes it another."""
        start = self._start(tensor)
        moves = self._looks_elsewhere(tensor) or (
            self.known.repointed and self.name_of(tensor) in self.known.repointed
        )
        return start if start is not None and moves else tensor

    def check_read(self, tensors: Iterable[Any]) -> None:
        """Raise where the recomputation is about to read what has moved.

        Raises:
            MutatedStateError: it is.
        """
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and has_memory(tensor):
                found = self.suspects.get(tensor.untyped_storage()._cdata)
                if found is not None:
                    raise self._moved(found)

    def _moved(self, tensor: torch.Tensor) -> MutatedStateError:
        if not isinstance(tensor, nn.Parameter):
            self.known.overwritten.add(self.name_of(tensor))
            watch_all_again()
        return MutatedStateError(
            f"{self.name_of(tensor)} (shape {list(tensor.shape)}), which a checkpoint region "
            "reads, was changed in place between the region's forward and its recomputation, so "
            "the recomputation would read other values. Expected the same values in both. If the "
            "region itself changes it, the next step is right: regions learn what they change. "
            "Else make the change after the backward, put a new tensor in its place (x = x + 1 in "
            "place of x += 1), or take the module out of the region."
        )

    def name_of(self, thing: Any) -> str:
        """A name for a tensor or an object that is held."""
        return name_of(thing, self._roots, self._state.holders, self._state.contents)


def _is_as_made(tensor: torch.Tensor, version: int) -> bool:
    """Whether a tensor has a history, and it is that of its values: gradients inside go through."""
    return _version(tensor) == version and has_history(tensor)


def _memory_of(tensor: torch.Tensor, storage: torch.UntypedStorage) -> torch.Tensor:
    return alias_like(tensor, tensor, storage).detach_()


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _looks_of(tensors: list[torch.Tensor]) -> list[Look]:
    try:
        return list(map(_look, tensors))
    except RuntimeError:  # inference tensors have no versions
        return [(_version(tensor), tensor.requires_grad) for tensor in tensors]
