"""What the recording of an eager step asks of single ops and tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeGuard

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves, tree_map_only

from ckpt_pass._torch import autograd, functorch
from ckpt_pass.eager.step_record import OpRecord, SavedRecord
from ckpt_pass.graph.capture import no_gradient
from ckpt_pass.graph.kernel_cache import OutputFacts
from ckpt_pass.graph.kernels import Kernels
from ckpt_pass.graph.sparse_rows import BAG_BACKWARD, with_all_rows
from ckpt_pass.ops.taxonomy import has_side_effects, is_sized_by_values, never_recompute
from ckpt_pass.policy.sites import output_tensors

#: Ops whose formulas save a number that Python gave them: autograd holds it as a tensor of its own,
#: which neither hooks nor modes see. Counted as if held to the end.
_SAVING_NUMBERS = frozenset(
    {
        torch.ops.aten.mul.Tensor, torch.ops.aten.mul_.Tensor,
        torch.ops.aten.div.Tensor, torch.ops.aten.div_.Tensor,
        torch.ops.aten.div.Tensor_mode, torch.ops.aten.div_.Tensor_mode,
    }
)  # fmt: skip
NUMBER_BYTES = 8


def statistics_of(model: nn.Module) -> Iterator[str]:
    """The names of the buffers in which normalisations keep running statistics."""
    known = dict(model.named_buffers())
    for prefix, module in model.named_modules():
        if isinstance(module, _NormBase):
            names = (f"{prefix}.{name}".lstrip(".") for name, _ in module.named_buffers())
            yield from (name for name in names if name in known)


def changed_tensors(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """What an op overwrites: as its schema says, and the statistics of a batch normalisation."""
    schema = getattr(func, "_schema", None)
    found: list[torch.Tensor] = []
    for index, argument in enumerate(schema.arguments if schema is not None else ()):
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if writes or argument.name in ("running_mean", "running_var"):
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            found += output_tensors(value if isinstance(value, (list, tuple)) else [value])
    return found


def storage_ids(tensors: Iterable[torch.Tensor]) -> set[int]:
    """What tells the memory behind tensors apart."""
    return {s._cdata for tensor in tensors for s in functorch.storages_of(tensor)}


def stand_ins(
    fakes: functorch.FakeTensorMode, given: Iterable[torch.Tensor], output: Any
) -> set[int]:
    """The memory of fake tensors that stood for real ones, where a sparse output may hold it.

    It is the real one's, which is not let go before the other.
    """
    if all(tensor.layout is torch.strided for tensor in output_tensors(output)):
        return set()
    found = set[int]()
    for real in (tensor for tensor in given if not autograd.is_fake(tensor)):
        storage = fakes.from_tensor(real).untyped_storage()
        weakref.finalize(storage, _let_go, real)
        found.add(storage._cdata)
    return found


def _let_go(_: torch.Tensor) -> None:
    """What it is given has been held until now."""


def fresh_ids(func: Any, args: tuple[Any, ...]) -> set[int]:
    """What an op is given that has been allocated for it: Python's numbers, as one tensor.

    ``torch.tensor`` and an index that is a list copy them where no mode sees it. Memory that is not
    torch's own, an array's, cannot be resized.
    """
    if func is not torch.ops.aten.lift_fresh.default:
        return set()
    return {s._cdata for s in functorch.storages_of(args[0]) if s.resizable()}


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor's elements fill its memory without overlap."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a fake tensor stands for one that a store takes: plain values in one storage."""
    dense = autograd.is_fake(tensor) and tensor.layout is torch.strided
    return dense and not (tensor.is_conj() or tensor.is_neg() or tensor.is_quantized)


def saved_record(value: torch.Tensor, storage: int, moment: int) -> SavedRecord:
    """What is noted of a value that autograd saves now."""
    return SavedRecord(
        storage,
        moment,
        plain=is_plain(value),
        node=autograd.newest_node_number(),
        waits=not value.requires_grad,
    )


class Sums:
    """Tells the engine's sums of gradients from those of its formulas."""

    def __init__(self) -> None:
        self._made_by: dict[int, int] = {}
        autograd.uses_when_alone()  # not to be found out by the first op that is seen

    def note(self, output: Any) -> None:
        """Remember the node of the graph in whose backward the tensors of an output are made."""
        node = autograd.node_number()
        for storage in storage_ids(output_tensors(output)):
            self._made_by[storage] = node

    def adds_up(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the engine adds two gradients, the first of which it owns alone.

        Of real tensors it does so in place (``input_buffer.cpp``, ``accumulate``), of fake ones,
        as of every subclass, it does not. A formula that adds owns what it has made alone, too, but
        allocates the sum: what the engine adds to comes from another node, or this one has given
        two gradients for one value.
        """
        if not _are_alike(func, args, kwargs) or not autograd.is_held_alone(args[0]):
            return False
        if not is_dense(args[0]) or not autograd.called_by_engine():
            return False
        (storage,) = storage_ids(args[:1])
        elsewhere = self._made_by.get(storage) != autograd.node_number()
        return elsewhere or autograd.node_leads_twice()


def _are_alike(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an op adds two strided tensors of one look, and keeps no history of it."""
    if func is not torch.ops.aten.add.Tensor or len(args) != 2 or kwargs:
        return False
    if torch.is_grad_enabled():  # a backward through this one may need both
        return False
    first, second = args
    if not (isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)):
        return False
    alike = first.shape == second.shape and first.dtype == second.dtype
    return alike and first.layout is torch.strided and second.layout is torch.strided


def is_taken_over(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the engine copies a sparse gradient that it would take over in a real step.

    Python has seen this one's indices and values, and holds them (``accumulate_grad.h``, case 1.2).
    """
    if func is not torch.ops.aten.clone.default or args[0].layout is not torch.sparse_coo:
        return False
    parts = functorch.parts_of(args[0])
    taken = autograd.accumulates() and all(part.is_contiguous() for part in parts)
    return taken and not torch.is_grad_enabled()


def with_known_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an op on fake tensors; by masks that are real, and grouped products in any dtype.

    The rule for the shapes of products knows bf16 only, while the CPU's kernel takes fp32 too
    (torch 2.13). Sparse gradients of bags have rows. The lengths of packed sequences are whole,
    and known.
    """
    if func is BAG_BACKWARD:
        gradient = func(*args, **kwargs)
        is_sparse = gradient.layout is torch.sparse_coo
        return with_all_rows(gradient, args) if is_sparse else gradient
    if func is torch.ops.aten.index.Tensor:
        return func(args[0], _without_masks(args[1]))
    if func is torch.ops.aten._pack_padded_sequence.default and not autograd.is_fake(args[1]):
        return _packed(*args)
    if func is not torch.ops.aten._grouped_mm.default or args[0].dtype is torch.bfloat16:
        return func(*args, **kwargs)
    halves = [value.to(torch.bfloat16) for value in args[:2]]
    return func(*halves, *args[2:], **kwargs).to(args[0].dtype)


def _packed(
    rows: torch.Tensor, lengths: torch.Tensor, batch_first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The packed rows, and how many sequences there are at each time: those are read later."""
    narrow = torch.empty((*rows.shape[:2], 1))
    _, at_each_time = torch.ops.aten._pack_padded_sequence(narrow, lengths, batch_first)
    return rows.new_empty((int(lengths.sum()), *rows.shape[2:])), at_each_time


def _without_masks(indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Indices with the numbers in the place of each real mask."""
    found: list[torch.Tensor | None] = []
    for index in indices:
        is_mask = index is not None and index.dtype in (torch.bool, torch.uint8)
        if index is None or not is_mask or autograd.is_fake(index):
            found.append(index)
        else:
            found += index.nonzero().unbind(-1)
    return found


def with_real_looks(output: Any, outputs: Sequence[OutputFacts] | None, known: set[int]) -> Any:
    """Fake outputs, each in the place of one that looks otherwise than the kernel's.

    Args:
        output: what the rules for fake tensors say.
        outputs: what the kernel returns; ``None`` where the rules are right.
        known: the storages that were there before; what is in them stays as it is.
    """
    fakes = list(output_tensors(output))
    if outputs is None or len(fakes) != len(outputs):
        return output
    real = iter(outputs)
    same, given = True, set[int]()

    def one(fake: torch.Tensor) -> torch.Tensor:
        nonlocal same
        found = next(real)
        if found.storage_bytes is None or fake.untyped_storage()._cdata in known:
            return fake
        look = (found.size, found.stride, getattr(torch, found.dtype))
        shared = fake.untyped_storage()._cdata in given  # two outputs of an LSTM's backward, say
        differs = shared or look != (tuple(fake.shape), fake.stride(), fake.dtype)
        if differs and (fake.numel() or found.storage_bytes):
            same = False
            size, stride, dtype = look
            fake = torch.empty_strided(size, stride, dtype=dtype, device=fake.device)
        if fake.untyped_storage().nbytes() != found.storage_bytes:
            functorch.resize_fake_storage(fake, found.storage_bytes)
        given.add(fake.untyped_storage()._cdata)
        return fake

    looks = tree_map_only(torch.Tensor, one, output)
    return output if same else looks


def as_really(call: fx.Node, output: Any, kernels: Kernels, known: set[int]) -> Any:
    """An op's fake outputs, made to look as its kernel's do.

    Not of what is real, nor where the size depends on values: a kernel's are made up. Nor of what
    is sparse: a kernel is run on empty ones.

    Args:
        call: the op.
        output: what the rules for fake tensors say.
        kernels: what measures it.
        known: the storages that were there before.
    """
    tensors = list(output_tensors(output))
    strided = all(tensor.layout is torch.strided for tensor in tensors)
    fakes = any(autograd.is_fake(tensor) for tensor in tensors)
    if not fakes or not strided or is_sized_by_values(call.target):
        return output
    return with_real_looks(output, kernels.outputs(call), known)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of a value: in containers, and in dataclasses, which a region copies as those."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            named = (field.name for field in dataclasses.fields(leaf))
            yield from tensors_in([getattr(leaf, name, None) for name in named])


class HeldNumbers:
    """Numbers that Python gives an op, and that autograd holds for its backward.

    It holds each as a tensor of its own, which neither hooks nor modes see. Those in graphs that
    the backward makes and runs are held until their node has run.
    """

    def __init__(self) -> None:
        self._let_go: dict[int, Callable[[], None]] = {}
        self._running = -1
        self._resolved: set[int] = set()

    def bytes_of(self, func: Any, args: tuple[Any, ...], given: Iterable[torch.Tensor]) -> int:
        """The bytes of the numbers that are held for an op."""
        if func not in _SAVING_NUMBERS or not torch.is_grad_enabled():
            return 0
        given = list(given)
        differentiable = any(tensor.requires_grad for tensor in given)
        if not differentiable and self._resolved.isdisjoint(storage_ids(given)):
            return 0
        held = sum(isinstance(value, (int, float)) for value in args)
        return NUMBER_BYTES * (held + 2 * sum(isinstance(value, complex) for value in args))

    def ran(self, func: Any, given: Iterable[torch.Tensor], output: Any) -> None:
        """An op has run.

        Where an op is given a conjugate that is none yet, torch makes it below autograd, and the
        op is seen with that, which requires no gradients.
        """
        lazy = func is torch.ops.aten.clone.default and any(
            t.requires_grad and (t.is_conj() or t.is_neg()) for t in given
        )
        self._resolved = storage_ids(output_tensors(output)) if lazy else set()

    def hold(self, let_go: Callable[[], None]) -> None:
        """The node that was made last holds numbers; afterwards it lets them go."""
        self._let_go[autograd.newest_node_number()] = let_go

    def begins(self) -> None:
        """An op begins."""
        node = autograd.node_number()
        if node != self._running:
            self._let_go.pop(self._running, _nothing)()
            self._running = node


def _nothing() -> None:
    """What there is to let go elsewhere."""


def has_effects(
    record: OpRecord,
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    buffers: frozenset[int],
) -> bool:
    """Whether an op must not run twice.

    Random numbers, changes of new values, and of the model's buffers apart: a region moves those
    once (``RecomputeMode``). What depends on the data (``nonzero``, ``item``) is found again.
    """
    if record.draws or (record.changes and -1 not in record.changes):
        return False
    if not has_side_effects(func) or not never_recompute(
        func, record.call.args, record.call.kwargs
    ):
        return False
    moved = changed_tensors(func, args, kwargs)
    return not moved or not storage_ids(moved) <= buffers


def buffers_moved(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], buffers: frozenset[int]
) -> Iterator[tuple[int, int]]:
    """The storages of some buffers that an op overwrites, and their bytes."""
    for tensor in changed_tensors(func, args, kwargs):
        for storage in functorch.storages_of(tensor):
            if storage._cdata in buffers:
                yield storage._cdata, storage.nbytes()


def _is_differentiable(value: Any) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor) and value.requires_grad


def differentiate(
    model: nn.Module, value: Any, received: AbstractContextManager[None] | None = None
) -> None:
    """Run the backward of what a step returned.

    A scalar is a loss, and so is what is called ``loss`` among several outputs, as in Hugging
    Face's; the caller holds the others. Of anything else every output gets a gradient of its own
    size, as from a loss that is computed elsewhere; it is made inside of ``received``, if given.

    Raises:
        NothingToDifferentiateError: nothing in it requires a gradient.
    """
    outputs = [v for v in tree_leaves(value) if _is_differentiable(v)]
    loss = value.get("loss") if isinstance(value, Mapping) else getattr(value, "loss", None)
    if len(outputs) == 1:
        loss = outputs[0]
    del value
    if _is_differentiable(loss) and loss.numel() == 1:
        loss.backward()
    elif not outputs:
        raise no_gradient(model)
    else:
        with received or contextlib.nullcontext():
            gradients = [torch.ones_like(output) for output in outputs]
        torch.autograd.backward(outputs, gradients)
