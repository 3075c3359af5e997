"""What a region reads besides its arguments, put back for the time of its recomputation.

A recomputation must read what the forward read. So the holders of a region's state (attributes,
parameters, buffers, hooks, containers, closures, globals) are copied, one level each and by
reference, when the forward begins. For the recomputation they hold that again, and afterwards what
they held before it. Tensors that were changed in place are another matter: what the forward itself
is known to overwrite is copied before it does, and stands in for the tensor in the recomputation.
Whatever else has changed is an error with the tensor's name.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import _disable_current_modes

from ckpt_pass._errors import CkptPassError
from ckpt_pass.regions.contents import Contents, read_spot, write_spot
from ckpt_pass.regions.holders import Holders, contents_of


class MutatedStateError(CkptPassError, RuntimeError):
    """What a region reads was changed in place before its recomputation; torch: ``RuntimeError``.

    A parameter, a buffer, or a tensor on an attribute, in a container, closure or global.
    """


class Known:
    """What earlier runs of a region have told; a module carries its own.

    Attributes:
        watched: whether a run was looked at, op by op.
        quiet: whether that run has left everything as it was.
        overwritten: names of the tensors that the region overwrites, as :meth:`Outside.name_of`
            gives them.
        name: of the module's class or of the function, once it is needed.
        options: for whoever runs the region: how it runs where nothing else is asked for.
    """

    __slots__ = (
        "__weakref__",
        "_contents",
        "_holders",
        "_root",
        "name",
        "options",
        "overwritten",
        "quiet",
        "watched",
    )

    def __init__(self, root: nn.Module | None = None) -> None:
        self.watched = False
        self.quiet = False
        self.overwritten: set[str] = set()
        self.name: str | None = None
        self.options: Any = None
        self._root = None if root is None else weakref.ref(root)
        self._holders: Holders | None = None
        self._contents: Contents | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # copies and pickles of the module find out for themselves

    def is_of(self, module: nn.Module) -> bool:
        """Whether it is that module's own: replicas share what their original carries."""
        return self._root is not None and self._root() is module

    def look(self, root: Any) -> tuple[Holders, Contents]:
        """The holders of a region's state, and what they hold now."""
        holders, contents = self._holders, self._contents
        if holders is None or contents is None or not contents.held_by(holders):
            holders = Holders(root)
            contents = Contents(holders)
            # What is kept here lives on: never values of a step.
            lasts = self._root is not None and holders.lasting
            if lasts and all(tensor.is_leaf for tensor in holders.tensors):
                self._holders, self._contents = holders, contents
            else:
                self._holders = self._contents = None
        return holders, contents


class Outside:
    """The state around one run of a region.

    Args:
        root: the region's module or function.
        known: what earlier runs have told.
    """

    __slots__ = ("_before", "_copies", "_held", "_holders", "_known", "_roots", "_versions")

    def __init__(self, root: Any, known: Known) -> None:
        self._roots: tuple[Any, ...] = (root,)
        self._known = known
        self._holders, self._held = known.look(root)
        self._versions = _versions(self._holders.tensors)
        #: Copies of storages as they were when the forward began, by the storage's address.
        self._copies: dict[int, torch.UntypedStorage] = {}
        self._before: Contents | None = None
        if known.overwritten:
            self._copy_overwritten()

    def add(self, *arguments: Any) -> None:
        """Hold what arguments lead to as well."""
        self._roots += arguments
        self._holders = Holders(*self._roots)
        self._held = Contents(self._holders)
        self._versions = _versions(self._holders.tensors)
        if self._known.overwritten:
            self._copy_overwritten()

    def learn(self) -> None:
        """Let later runs know what the forward has done, which ends now."""
        known, holders = self._known, self._holders
        known.overwritten.update(self.overwritten())
        unmoved = not self._copies and _versions(holders.tensors) == self._versions
        known.watched, known.quiet = True, unmoved and self._held.held_by(holders)

    def owner_of_statistics(self) -> nn.Module | None:
        """The module that the region is (or is a method of), if it has running statistics."""
        if not self._holders.norms:
            return None
        root = self._roots[0]
        owner = root if isinstance(root, nn.Module) else getattr(root, "__self__", None)
        if not isinstance(owner, nn.Module):
            return None
        norms = (module for module in owner.modules() if isinstance(module, _NormBase))
        return owner if any(norm.track_running_stats for norm in norms) else None

    def has(self, container: Any) -> bool:
        """Whether a container's contents are put back."""
        return self._holders.has(container)

    def storages(self) -> dict[int, torch.Tensor]:
        """One tensor for each storage that is held, by the storage's address."""
        found = filter(_has_storage, self._holders.tensors)
        return {t.untyped_storage()._cdata: t for t in found}

    def about_to_change(self, tensor: torch.Tensor) -> None:
        """Copy the storage of a tensor that the forward overwrites; once."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._copies:
            self._copies[storage._cdata] = _copy(storage)

    def overwritten(self) -> Iterator[str]:
        """The names of the tensors that are copied."""
        for tensor in self._holders.tensors:
            if self._copied(tensor) is not None:
                yield self.name_of(tensor)

    def _copy_overwritten(self) -> None:
        for tensor in self.storages().values():
            if self.name_of(tensor) in self._known.overwritten:
                self.about_to_change(tensor)

    def _copied(self, tensor: torch.Tensor) -> torch.UntypedStorage | None:
        if not self._copies or not _has_storage(tensor):
            return None
        return self._copies.get(tensor.untyped_storage()._cdata)

    def put_in(self, differentiable: bool = False) -> None:
        """Make the holders hold what the forward began with; :meth:`put_back` ends that.

        Args:
            differentiable: whether the recomputation's own history is differentiated.

        Raises:
            MutatedStateError: a tensor has other values now, and no copy of it is there.
        """
        holders, held = self._holders, self._held
        moved = self._copies or _versions(holders.tensors) != self._versions
        if not moved and held.held_by(holders):
            # What has changed nothing will not, this time.
            self._before = None if self._known.quiet else held
            return
        self._known.quiet = False
        before = Contents(holders)
        held.put_into(holders)
        self._before = before
        if moved:
            try:
                self._substitute(differentiable)
            except MutatedStateError:
                self.put_back()
                raise

    def put_back(self) -> None:
        """Make the holders hold what they held before :meth:`put_in`."""
        before, self._before = self._before, None
        if before is not None and not before.held_by(self._holders):
            before.put_into(self._holders)

    def _substitute(self, differentiable: bool) -> None:
        """Put copies in the places of tensors that were changed in place."""
        copies = {address: _copy(storage) for address, storage in self._copies.items()}
        stand_ins: dict[int, torch.Tensor] = {}
        present = {id(value) for value in self._present()}
        for tensor, version in zip(self._holders.tensors, self._versions, strict=True):
            if id(tensor) not in present or id(tensor) in stand_ins:
                continue
            address = tensor.untyped_storage()._cdata if _has_storage(tensor) else 0
            if address in copies and not (differentiable and tensor.requires_grad):
                stand_ins[id(tensor)] = _alias(tensor, copies[address])
            elif _version(tensor) != version or address in copies:
                raise self._moved(tensor)
        if stand_ins:
            self._replace(stand_ins)

    def _present(self) -> Iterator[Any]:
        """What the holders hold now, those that FSDP2 has taken away excepted."""
        holders = self._holders
        for mapping in holders.mappings():
            yield from dict.values(mapping)
        for sequence in (*holders.lists, *holders.sets):
            yield from sequence
        for cell in holders.cells:
            yield from contents_of(cell)
        for space, name, _ in holders.spots:
            yield read_spot(space, name)

    def _replace(self, stand_ins: dict[int, torch.Tensor]) -> None:
        holders = self._holders
        for mapping in holders.mappings():
            found = {k: stand_ins[id(v)] for k, v in dict.items(mapping) if id(v) in stand_ins}
            for key, value in found.items():
                dict.__setitem__(mapping, key, value)
        for sequence in holders.lists:
            for index, value in enumerate(list(sequence)):
                if id(value) in stand_ins:
                    sequence[index] = stand_ins[id(value)]
        for cell in holders.cells:
            for value in tuple(contents_of(cell)):
                if id(value) in stand_ins:
                    cell.cell_contents = stand_ins[id(value)]
        for space, name, _ in holders.spots:
            value = read_spot(space, name)
            if id(value) in stand_ins:
                write_spot(space, name, stand_ins[id(value)])

    def _moved(self, tensor: torch.Tensor) -> MutatedStateError:
        if not isinstance(tensor, nn.Parameter):
            self._known.overwritten.add(self.name_of(tensor))
        return MutatedStateError(
            f"{self.name_of(tensor)} (shape {list(tensor.shape)}), which a checkpoint region "
            "reads, was changed in place between the region's forward and its recomputation, so "
            "the recomputation would read other values. Expected the same values in both. Make "
            "the change after the backward, put a new tensor in its place (x = x + 1 in place of "
            "x += 1), or take the module out of the region."
        )

    def name_of(self, tensor: torch.Tensor) -> str:
        """A name for a tensor that is held."""
        for root in self._roots:
            for name, module in _modules(root):
                for kind, key, value in _members(module):
                    if value is tensor:
                        where = f"{name}.{key}" if name else str(key)
                        return f"{kind} {where!r} of {type(module).__name__}"
        for space, name, value in self._holders.spots:
            if value is tensor:
                kind = "The global" if isinstance(space, dict) else "The attribute"
                return f"{kind} {name!r}"
        for sequence, held in zip(self._holders.lists, self._held.lists, strict=True):
            for index, value in enumerate(held):
                if value is tensor:
                    return f"Element {index} of a {type(sequence).__name__}"
        for mapping, entries in zip(self._holders.maps, self._held.maps, strict=True):
            for key, value in entries.items():
                if value is tensor:
                    return f"Entry {key!r} of a {type(mapping).__name__}"
        return "A tensor"


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _versions(tensors: list[torch.Tensor]) -> list[int]:
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:  # inference tensors have none
        return list(map(_version, tensors))


def _has_storage(tensor: torch.Tensor) -> bool:
    plain = type(tensor) is torch.Tensor or type(tensor) is nn.Parameter
    return plain and tensor.layout is torch.strided


def _copy(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    with _disable_current_modes():  # no op of the region
        copied: torch.UntypedStorage = storage.clone()
    return copied


def _alias(tensor: torch.Tensor, storage: torch.UntypedStorage) -> torch.Tensor:
    """A leaf like a tensor, over another storage."""
    with torch.no_grad():
        made = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        made.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(made, tensor.requires_grad)
    return made.requires_grad_(tensor.requires_grad)


def _modules(root: Any) -> Iterator[tuple[str, nn.Module]]:
    owner = root if isinstance(root, nn.Module) else getattr(root, "__self__", None)
    if isinstance(owner, nn.Module):
        yield from owner.named_modules()
    for cell in getattr(root, "__closure__", None) or ():
        for value in contents_of(cell):
            if isinstance(value, nn.Module):
                yield from value.named_modules()


def _members(module: nn.Module) -> Iterator[tuple[str, str, Any]]:
    own = module.__dict__
    for kind, held in (
        ("Parameter", own.get("_parameters")),
        ("Buffer", own.get("_buffers")),
        ("Attribute", own),
    ):
        for key, value in dict.items(held or {}):
            yield kind, key, value
            if kind == "Attribute" and isinstance(value, (list, tuple)):
                yield from (("Element", f"{key}[{n}]", item) for n, item in enumerate(value))
            elif kind == "Attribute" and isinstance(value, dict) and not key.startswith("_"):
                yield from (("Entry", f"{key}[{n!r}]", item) for n, item in value.items())
