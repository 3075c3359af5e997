"""A region's arguments, kept for its recomputation as its forward got them."""

from __future__ import annotations

import collections
import copy
import dataclasses
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch import autograd, storages
from ckpt_pass.offloading.store import MovedValueChangedError
from ckpt_pass.offloading.window import Moved, Window
from ckpt_pass.regions.ambient import accelerators
from ckpt_pass.regions.kinds import ATOMS
from ckpt_pass.state.objects import keeper_for
from ckpt_pass.state.shown import owner_of

#: Containers that are copied entry by entry; what is derived from them may be more than that.
_MAPPINGS = (dict, collections.OrderedDict, collections.defaultdict)
_SEQUENCES = (list, collections.deque)


@dataclasses.dataclass(frozen=True, slots=True)
class Made:
    """Stands for an argument that the region before makes again."""

    number: int
    requires_grad: bool


#: What is kept as it is.
_KEPT = frozenset((torch.Tensor, nn.Parameter, Made, *ATOMS))


class Keeper(Protocol):
    """What keeps some of a region's arguments otherwise than by holding them."""

    def takes(self, tensor: torch.Tensor) -> bool:
        """Whether it does so with this one."""
        ...

    def pack(self, tensor: torch.Tensor) -> Any:
        """What is held instead; of others the tensor itself."""
        ...

    def unpack(self, packed: Any) -> torch.Tensor:
        """The tensor again."""
        ...


class MutatedArgumentError(CkptPassError, RuntimeError):
    """An argument was changed in place before its recomputation; autograd: ``RuntimeError``."""


def named_tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of an argument: itself, or in lists, tuples, dicts and dataclasses."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif type(value) in _KEPT:
        return
    elif isinstance(value, (list, tuple, collections.deque)):
        for index, item in enumerate(value):
            yield from named_tensors(f"{name}[{index}]", item)
    elif isinstance(value, dict):
        for key, item in dict.items(value):
            yield from named_tensors(f"{name}[{key!r}]", item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for key, item in _fields(value):
            yield from named_tensors(f"{name}.{key}", item)


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(value):
        if hasattr(value, field.name):
            yield field.name, getattr(value, field.name)


class Copier:
    """Copies the containers in arguments, each once; the caller's are then the caller's alone.

    Attributes:
        mutable: what a recomputation may change: copies, and objects that are kept as they are.
        iterators: whether there are iterators, which a run moves on.
    """

    def __init__(self, keeps: Callable[[Any], bool]) -> None:
        self._keeps = keeps
        self._made: dict[int, Any] = {}
        self.mutable: list[Any] = []
        self.iterators = False

    def __call__(self, value: Any) -> Any:
        cls = type(value)
        if cls in _KEPT or isinstance(value, torch.Tensor):
            return value
        if cls is types.BuiltinFunctionType and owner_of(value) is None:
            return value
        made = self._made.get(id(value))
        if made is None:
            made = value if self._keeps(value) else self._copy(cls, value)
            self._made[id(value)] = made
        return made

    def _copy(self, cls: type, value: Any) -> Any:
        if _is_iterator(value):
            self.iterators = True
            made = copy.copy(value)
            self.mutable.append(made)  # what it reads from is the caller's
            return made
        if isinstance(value, tuple):
            items = [self(item) for item in value]
            if all(a is b for a, b in zip(items, value, strict=True)):
                return value
            return cls._make(items) if hasattr(cls, "_make") else cls(items)
        made = value
        if cls in _MAPPINGS or cls in _SEQUENCES or cls is set:
            made = self._made[id(value)] = copy.copy(value)
            if cls in _MAPPINGS:
                for key, item in value.items():
                    made[key] = self(item)
            elif cls in _SEQUENCES:
                for index, item in enumerate(value):
                    made[index] = self(item)
        elif dataclasses.is_dataclass(value) and not isinstance(value, (dict, type)):
            made = self._made[id(value)] = copy.copy(value)
            for name, item in _fields(value):
                object.__setattr__(made, name, self(item))
        self.mutable.append(made)
        return made


def _is_iterator(value: Any) -> bool:
    """Whether a value is an iterator that a copy can stand in for."""
    keeper = keeper_for(type(value))
    return keeper is not None and keeper.copy is not None


def _with_new_iterators(value: Any) -> Any:
    """An argument, or a tuple, with a copy of each iterator; those in containers are put back."""
    if isinstance(value, tuple):
        items = [_with_new_iterators(item) for item in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        return type(value)._make(items) if hasattr(value, "_make") else type(value)(items)
    return copy.copy(value) if _is_iterator(value) else value


class _Packed:
    """A tensor among the arguments, as hooks keep it.

    Args:
        tensor: when the region's forward began.
        held: what the hooks gave for it.
    """

    __slots__ = ("_tensor", "_version", "held", "is_leaf", "requires_grad")

    def __init__(self, tensor: torch.Tensor, held: Any) -> None:
        self.held = held
        self.requires_grad, self.is_leaf = tensor.requires_grad, tensor.is_leaf
        self._tensor, self._version = weakref.ref(tensor), storages.version_of(tensor)

    def changes_of(self, found: torch.Tensor) -> int:
        """How often what the hooks give back was changed in place since.

        Hooks that copy keep what it was (0); others may give the very tensor (``save_on_cpu`` of
        one that lies there), and nobody else looks at its version.
        """
        return storages.version_of(found) - self._version if found is self._tensor() else 0


class Arguments:
    """A region's arguments, kept for its recomputation.

    Lists, dicts, sets and dataclasses are copied, so that it sees their entries of now, whatever
    the region or its caller puts there later. Without saved-tensor hooks around the region tensors
    are kept as they are, and their versions tell whether somebody changed them. With hooks (an
    outer checkpoint region, offloading to the CPU), these decide how tensors are kept, as for any
    value that autograd saves.

    Args:
        args, kwargs: the arguments.
        name: of the region.
        keeps: whether a container is state of the region itself, and put back as that.
        keeper: what keeps activations otherwise, where the region's inputs are offloaded or
            sharded: tensors that have a history. Those without (a step's inputs, masks, positions,
            parameters, buffers) are there anyway. Hooks around the region go before it.
    """

    __slots__ = (
        "_args",
        "_flat",
        "_iterators",
        "_kwargs",
        "_name",
        "_tensors",
        "_unpack",
        "devices",
        "inside",
        "mutable",
    )

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str,
        keeps: Callable[[Any], bool],
        keeper: Keeper | None = None,
    ) -> None:
        self._name = name
        self._unpack: autograd.UnpackHook | None = None
        self._iterators = False
        #: What a recomputation may change: to be put back before each.
        self.mutable: list[Any] = []
        #: The tensors in containers, which later runs may find others in.
        self.inside: list[torch.Tensor] = []
        values = (*args, *kwargs.values()) if kwargs else args
        if _KEPT.issuperset(map(type, values)):
            tensors = [v for v in values if isinstance(v, torch.Tensor)]
        else:
            copier = Copier(keeps)
            args = tuple(copier(value) for value in args)
            kwargs = {key: copier(value) for key, value in kwargs.items()}
            tensors = [tensor for _, tensor in named_arguments(args, kwargs)]
            self.mutable, self._iterators = copier.mutable, copier.iterators
            own = set(map(id, values))
            self.inside = [tensor for tensor in tensors if id(tensor) not in own]
        self.devices = accelerators(tensors)
        self._args, self._kwargs = args, kwargs
        self._tensors: list[tuple[torch.Tensor, int, bool]] = []
        hooks = autograd.saved_hooks()
        if hooks is not None:
            self._pack_with(hooks)
            return
        held = tensors
        if keeper is not None:
            held = [t for t in tensors if not keeper.takes(t)]
        self._tensors = [(t, t._version, t.requires_grad) for t in held if not t.is_inference()]
        if keeper is not None and len(held) < len(tensors):
            self._pack_with((keeper.pack, keeper.unpack))

    def _pack_with(self, hooks: tuple[Any, Any]) -> None:
        pack, self._unpack = hooks
        flat, spec = tree_flatten((self._args, self._kwargs))
        with torch.no_grad():
            self._flat = (
                [
                    _Packed(value, pack(value)) if isinstance(value, torch.Tensor) else value
                    for value in flat
                ],
                [isinstance(value, torch.Tensor) for value in flat],
                spec,
            )
        self._args, self._kwargs = (), {}
        self.inside = []
        # Containers are made anew from their leaves, so that only the others need be put back.
        leaves = {id(value) for value in flat}
        self.mutable = [value for value in self.mutable if id(value) in leaves]

    def again(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as the forward got them; containers hold what they held.

        Raises:
            MutatedArgumentError: one was changed in place in the meantime.
        """
        switched = None
        for tensor, version, flag in self._tensors:
            if tensor._version != version:
                raise self._mutated(tensor, tensor._version - version)
            if tensor.requires_grad is not flag:
                switched = {id(t): flag for t, _, flag in self._tensors}
        args, kwargs = self._args, self._kwargs
        if self._unpack is not None:
            args, kwargs = self._unpacked()
        elif switched is not None:
            args, kwargs = self._with_flags(switched)
        if not self._iterators:
            return args, kwargs
        return _with_new_iterators(args), {k: _with_new_iterators(v) for k, v in kwargs.items()}

    def _with_flags(self, flags: dict[int, bool]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, but leaves that require gradients as they did."""

        def flagged(value: torch.Tensor) -> torch.Tensor:
            flag = flags.get(id(value), value.requires_grad)
            return value if flag is value.requires_grad else value.detach().requires_grad_(flag)

        args, kwargs = tree_map_only(torch.Tensor, flagged, (self._args, self._kwargs))
        return args, kwargs

    def _mutated(self, tensor: torch.Tensor, times: int) -> MutatedArgumentError:
        named = named_arguments(self._args, self._kwargs)
        where = next((f", {name}" for name, value in named if value is tensor), "")
        return MutatedArgumentError(
            f"An argument of {self._name}{where} (shape {list(tensor.shape)}), was changed in "
            f"place {times} times after the region's forward began, so it "
            "cannot be recomputed. Clone the argument before the in-place op, or take the op out "
            "of the region."
        )

    def _unpacked(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        assert self._unpack is not None
        packed, is_tensor, spec = self._flat
        flat = []
        for value, tensor in zip(packed, is_tensor, strict=True):
            if not tensor:
                flat.append(value)
                continue
            found = self._unpack(value.held)
            if (times := value.changes_of(found)) != 0:
                raise self._mutated(found, times)
            found = found.detach()
            if value.requires_grad:
                found = found.requires_grad_() if value.is_leaf else autograd.with_history(found)
            flat.append(found)
        args, kwargs = tree_unflatten(flat, spec)
        return args, kwargs


class MovedArguments:
    """Puts activations among a region's arguments away.

    Args:
        window: what does it.
        name: of the region.
    """

    def __init__(self, window: Window, name: str) -> None:
        self._window = window
        self._name = name

    def takes(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is put away: one that has a history."""
        return tensor.grad_fn is not None and self._window.is_worth_moving(tensor)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | Moved:
        """Put it away, or hold it."""
        return self._window.put(tensor) if self.takes(tensor) else tensor

    def unpack(self, packed: torch.Tensor | Moved) -> torch.Tensor:
        """The tensor again.

        Raises:
            MutatedArgumentError: it was changed in place on its way.
        """
        if isinstance(packed, torch.Tensor):
            return packed
        try:
            return packed.take()
        except MovedValueChangedError as error:
            raise MutatedArgumentError(
                f"An argument of {self._name} (shape {list(packed.layout.size)}), which is "
                "offloaded, was changed in place before the region's forward had ended, so it "
                "cannot be recomputed. Clone the argument before the in-place op, or take the op "
                "out of the region."
            ) from error


def named_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    for index, value in enumerate(args):
        yield from named_tensors(f"args[{index}]", value)
    for key, value in kwargs.items():
        yield from named_tensors(key, value)
