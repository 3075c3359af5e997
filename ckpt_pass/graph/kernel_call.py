"""A kernel's call, made again from its node: real tensors like those of the graph, and the op.

Tensors have the sizes, strides, dtype and device of the node's inputs, with made-up contents. These
are valid (indices are 0, offsets rise) but mean nothing, so that what depends on the data, such as
the sizes of groups, is one case of many.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import fx

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch.operators import OpOverload, argument_value
from ckpt_pass.graph.joint import is_multi_output_access
from ckpt_pass.graph.sparse_rows import BAG_BACKWARD, without_padding
from ckpt_pass.ops.taxonomy import op_name
from ckpt_pass.policy.sites import optimization_hint, output_tensors

#: Runs a kernel; returns its output and the storages of its inputs.
Run: TypeAlias = Callable[[], tuple[Any, set[int]]]

#: Where a placeholder that stands for an output of another call says so: (its node, which output).
MADE_BY = "ckpt_pass_made_by"
#: Where a node says that its kernel runs while gradients are enabled.
WITH_GRAD = "ckpt_pass_with_grad"
NOTHING: Mapping[fx.Node, Any] = MappingProxyType({})

#: Arguments that split the rows of another into groups: they rise to the number of rows.
OFFSET_ARGUMENTS = ("offs",)
#: Arguments of whole numbers from 1 on: of each group how many, of a factor its exchanged rows.
#: A kernel leaves out what has 0 of something, or refuses it.
COUNT_ARGUMENTS = ("bag_size", "lengths", "pivots", "LU_pivots")
_WRITE_BY_INDEX = frozenset(
    {
        torch.ops.aten.index_put.default,
        torch.ops.aten.index_put_.default,
        torch.ops.aten._unsafe_index_put.default,
        torch.ops.aten._index_put_impl_.default,
    }
)
_WRITE_BY_MASK = (torch.ops.aten.masked_scatter.default, torch.ops.aten.masked_scatter_.default)
_COPY_ALL_MEMORY = frozenset(
    {
        torch.ops.aten.copy.default,
        torch.ops.aten.select_scatter.default,
        torch.ops.aten.slice_scatter.default,
        torch.ops.aten.diagonal_scatter.default,
        torch.ops.aten.as_strided_scatter.default,
    }
)
#: Numbers that say what is drawn: a seed, an offset, or both in one.
_SEED = 2


class KernelError(CkptPassError):
    """A kernel cannot be run on its own; the message says which, and why."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"Node {node.name} ({node.target}) cannot be measured on its own: {reason}. Expected "
            "an op that runs on made-up tensors of the shapes in the graph. Leave it to the "
            "estimates, or plan on a machine where it runs."
        )


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be made: its metadata, and what its contents must be like.

    Attributes:
        rows: of an offsets argument, what it rises to.
        counts: whether it says how many there are of something; it is 1 each.
        statistic: whether it is a further output of an op with several, such as a saved mean.
        source: what really makes it, and which output of that it is, where its bytes are opaque:
            they mean something to the kernel that wrote them alone.
        held: elements of its memory, where an op copies all of that and not the tensor alone.
        chosen: of a mask, how much it chooses; else all.
        conjugate, negative: whether its values are to be read so; most kernels make a copy then.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    rows: int | None = None
    statistic: bool = False
    source: tuple[Call, int] | None = None
    conjugate: bool = False
    negative: bool = False
    held: int = 0
    counts: bool = False
    chosen: int | None = None

    def __str__(self) -> str:
        rows = "" if self.rows is None else f" to {self.rows}"
        rows += " counts" * self.counts
        rows += "" if self.chosen is None else f" choosing {self.chosen}"
        made = "" if self.source is None else f" = {self.source[0]}#{self.source[1]}"
        name = str(self.dtype).removeprefix("torch.")
        read = " conjugate" * self.conjugate + " negative" * self.negative
        read += f" of {self.held}" if self.held else ""
        return f"{name}{list(self.size)}/{list(self.stride)}@{self.device.type}{rows}{made}{read}"

    def make(self) -> torch.Tensor:
        """A tensor of these sizes and strides; elements overlap where strides make them."""
        if self.source is not None:
            call, index = self.source
            made: torch.Tensor = call.prepared()()[0][index]
            return made
        extent = sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True)) + 1
        count = max(extent, self.held) if all(self.size) else 0
        flat = torch.empty(count, dtype=self.dtype, device=self.device)
        if self.rows is not None:
            step = torch.linspace(self.rows / max(count, 1), self.rows, count)
            flat.copy_(step.round())
        elif self.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            # No constants: a GPU computes on them with less power, so at a higher clock.
            generator = torch.Generator(self.device)
            flat.uniform_(0.1, 1.0, generator=generator.manual_seed(0))
        else:
            index = not (self.dtype.is_floating_point or self.dtype.is_complex)
            flat.fill_(0 if index and self.dtype is not torch.bool and not self.counts else 1)
        if self.chosen is not None:
            flat[self.chosen :] = 0
        found = flat.as_strided(self.size, self.stride)
        found = torch._neg_view(found) if self.negative else found
        return found.conj() if self.conjugate else found


@dataclass(frozen=True)
class Call:
    """A call to be made: the op, and its arguments with :class:`TensorSpec` for tensors.

    Attributes:
        with_grad: whether gradients are enabled meanwhile; some kernels ask for that.
    """

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    device: torch.device
    with_grad: bool = False

    def __str__(self) -> str:
        named = [f"{name}={_text(value)}" for name, value in sorted(self.kwargs.items())]
        grad = " with gradients" if self.with_grad else ""
        return f"{op_name(self.target)}({', '.join([*map(_text, self.args), *named])}){grad}"

    def with_wide_statistics(self) -> Call:
        """The same with saved statistics in fp32.

        A fake tensor of them may be of another dtype than the real one: batch and layer norms of
        bf16 inputs with fp32 weights keep theirs in fp32 on the CPU (torch 2.13).
        """

        def widen(value: Any) -> Any:
            if isinstance(value, TensorSpec) and value.statistic and value.dtype.itemsize == 2:
                return replace(value, dtype=torch.float32)
            return value

        kwargs = {name: mapped(value, widen) for name, value in self.kwargs.items()}
        return replace(self, args=mapped(self.args, widen), kwargs=kwargs)

    @property
    def has_opaque_arguments(self) -> bool:
        """Whether made-up bytes would stand for what only a kernel knows to read.

        A ``uint8`` argument of a builtin backward or recurrent kernel is such, if nothing says
        what makes it: a kernel that believes it may read anywhere.
        """
        return any(
            spec.dtype is torch.uint8 and spec.source is None
            for spec in specs_in((self.args, dict(self.kwargs)))
        )

    @property
    def has_whole_numbers(self) -> bool:
        """Whether tensors of whole numbers or bytes are among the arguments."""
        specs = specs_in((self.args, dict(self.kwargs)))
        floats = (spec.dtype.is_floating_point or spec.dtype.is_complex for spec in specs)
        return not all(floats)

    def prepared(self) -> Run:
        """Make the inputs; return what runs the kernel on them, as often as one likes."""
        tensors: list[torch.Tensor] = []

        def make(value: Any) -> Any:
            if isinstance(value, torch.Generator):
                return torch.Generator(value.device)  # the user's own is not to move on
            if not isinstance(value, TensorSpec):
                return value
            tensors.append(value.make())
            return tensors[-1]

        args = mapped(self.args, make)
        kwargs = {name: mapped(value, make) for name, value in self.kwargs.items()}
        given = {tensor.untyped_storage()._cdata for tensor in tensors}

        def run() -> tuple[Any, set[int]]:
            with torch.set_grad_enabled(self.with_grad):
                return self.target(*args, **kwargs), given

        return run


def specs_in(value: Any) -> Iterator[TensorSpec]:
    """The tensors among arguments."""
    if isinstance(value, TensorSpec):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from specs_in(item)


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, torch.Generator):
        return f"a generator on {value.device}"
    return str(value) if isinstance(value, TensorSpec) else repr(value)


def mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """Arguments with a function applied to each, lists and tuples entered."""
    if isinstance(value, (tuple, list)):
        items = [mapped(item, function) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    return function(value)


def call_of(node: fx.Node, really: Mapping[fx.Node, Any] = NOTHING) -> Call:
    """The call that a node stands for; symbolic sizes have their values at the traced shape.

    Args:
        node: with a fake tensor, or several, in ``meta["val"]``, as its arguments have.
        really: tensors of any device that look as those of these nodes really do, where their
            fake ones look otherwise.

    Raises:
        KernelError: an argument is none that can be made up.
    """
    assert callable(node.target)
    read: Callable[[Any], Any] = functools.partial(_argument, node, really)
    args: tuple[Any, ...] = mapped(node.args, read)
    kwargs = {name: mapped(value, read) for name, value in node.kwargs.items()}
    if isinstance(node.target, OpOverload):
        for name in (*OFFSET_ARGUMENTS, *COUNT_ARGUMENTS):
            given = argument_value(node.target, name, args, kwargs)
            if isinstance(given, TensorSpec):
                counts = name in COUNT_ARGUMENTS
                rows = None if counts else _rows(args)
                filled = replace(given, rows=rows, counts=counts)
                args = tuple(filled if value is given else value for value in args)
                kwargs = {k: filled if v is given else v for k, v in kwargs.items()}
    if node.target in _WRITE_BY_INDEX:
        args = _with_chosen(args)
    if node.target in _WRITE_BY_MASK:
        values, mask, written = args
        args = (values, _choosing(mask, written.size), written)
    if node.target is torch.ops.aten.masked_scatter_backward.default:
        gradient, mask, size = args
        args = (gradient, _choosing(mask, size), size)
    if node.target is BAG_BACKWARD:
        args = without_padding(args)  # made-up indices are 0
    device = _device(node, args, kwargs)
    return Call(node.target, args, kwargs, device, node.meta.get(WITH_GRAD, False))


def _choosing(mask: TensorSpec, size: Sequence[int]) -> TensorSpec:
    """A mask that chooses as many elements as a tensor of a size has."""
    shown = (n for n, step in zip(mask.size, mask.stride, strict=True) if step == 0)
    # An expanded one shows each of its own several times.
    return replace(mask, chosen=math.prod(size) // max(math.prod(shown), 1))


def _argument(node: fx.Node, really: Mapping[fx.Node, Any], argument: Any) -> Any:
    """What stands for an argument: a tensor's metadata, or a number at the traced shape."""
    value = argument.meta.get("val") if isinstance(argument, fx.Node) else argument
    if isinstance(value, torch.SymInt):
        # A number that only the step's values tell is no size (those are refused): any will do.
        return 1 if value.node.hint is None else optimization_hint(value)
    if isinstance(value, (torch.SymFloat, torch.SymBool)):
        return 1 if value.node.hint is None else value.node.hint
    if not isinstance(argument, fx.Node) or isinstance(value, (int, float)):
        return value
    if not isinstance(value, torch.Tensor):
        raise KernelError(node, f"its input {argument.name} is a {type(value).__name__}")
    if value.layout is not torch.strided or value.device.type == "meta":
        raise KernelError(node, f"its input {argument.name} is {value.layout} on {value.device}")
    look = really.get(argument, value)
    return TensorSpec(
        tuple(map(optimization_hint, look.shape)),
        tuple(map(optimization_hint, look.stride())),
        look.dtype,
        value.device,
        statistic=is_multi_output_access(argument) and argument.args[1:] != (0,),
        source=_source(argument, really) if only_its_maker_knows(look) else None,
        conjugate=value.is_conj(),
        negative=value.is_neg(),
        held=_held(look) if argument is node.args[0] and copies_all_memory(node.target) else 0,
    )


def copies_all_memory(target: object) -> bool:
    """Whether a kernel copies all memory behind its first argument, and not the tensor alone.

    So do the functional forms of writing into a view (``clone_preserve_strides``), whose result
    is a view of that copy.
    """
    return target in _COPY_ALL_MEMORY


def _held(look: Any) -> int:
    """The elements of a view's memory, where they are more than the tensor spans."""
    storage = look.untyped_storage() if isinstance(look, torch.Tensor) else None
    if storage is None:
        return 0
    held = optimization_hint(storage.nbytes()) // look.dtype.itemsize
    return held if held > optimization_hint(look.numel()) else 0


def only_its_maker_knows(look: torch.Tensor) -> bool:
    """Whether made-up contents would lead a kernel astray: bytes, and seeds of random numbers.

    Of fused attention on CUDA the seed and the offset of what it draws are further outputs, numbers
    in memory of the host where fake tensors say the device's: its backward reads them there.
    """
    number = not (look.dtype.is_floating_point or look.dtype.is_complex)
    return look.dtype is torch.uint8 or (
        number and look.dim() <= 1 and optimization_hint(look.numel()) <= _SEED
    )


def _source(argument: fx.Node, really: Mapping[fx.Node, Any]) -> tuple[Call, int] | None:
    """The call that makes an argument whose bytes only kernels know to read, and which output."""
    made = argument.meta.get(MADE_BY)
    if made is None and is_multi_output_access(argument):
        made = argument.args
    if made is None or made[1] == 0:
        return None
    return call_of(made[0], really), made[1]


def _rows(args: tuple[Any, ...]) -> int:
    """What offsets split: the tokens of [T, K] by [G, K, N], of [K, T] by [T, N], or columns."""
    left, right, *_ = (arg for arg in args if isinstance(arg, TensorSpec))
    if len(left.size) == 3:
        return right.size[-1]
    grouped = any(isinstance(arg, TensorSpec) and len(arg.size) == 3 for arg in args)
    return left.size[0 if grouped else 1]


def _with_chosen(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of an ``index_put`` by one mask, which chooses as much as is written."""
    values, indices, written, *others = args
    at = [i for i, index in enumerate(indices) if index is not None]
    if len(at) != 1 or indices[at[0]].dtype is not torch.bool:
        return args
    dim, mask = at[0], indices[at[0]]
    ranks = (
        len(values.size) - len(mask.size) + 1
    )  # the mask's dimensions are one in what is written
    if len(written.size) != ranks or written.size[dim] == 1:
        return args
    found = list(indices)
    found[dim] = replace(mask, chosen=written.size[dim])
    return (values, found, written, *others)


def _device(node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.device:
    """Where a call runs: where its outputs are, else its inputs."""
    found = [tensor.device for tensor in output_tensors(node.meta.get("val"))]
    found += [arg.device for arg in (*args, *kwargs.values()) if isinstance(arg, TensorSpec)]
    return found[0] if found else torch.device("cpu")
