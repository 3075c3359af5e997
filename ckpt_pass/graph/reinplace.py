"""Which ops may write their result over one of their inputs.

An elementwise op reads each element once, before it writes the one in its place, so that its
result may take the memory of an input that nothing reads afterwards: the same kernel, the same
bits, one buffer less. Torch has such a pass for Inductor
(``torch/_inductor/fx_passes/reinplace.py``), where it undoes functionalisation; graphs that run op
by op (``aot_eager``) have none.

Only what the backward itself has made may be overwritten: saved activations, parameters and
tangents belong to others too (a second backward through a retained graph reads them again).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from ckpt_pass._torch import functorch
from ckpt_pass._torch.operators import (
    OpOverload,
    has_own_kernel,
    op_overload,
    overloads_of,
    packet_of,
)
from ckpt_pass.graph.cost import as_bytes

# Functional op -> the variant that writes into a tensor it is given. All are elementwise
# (TensorIterator kernels, which allow an output that is exactly one of the inputs).
_ELEMENTWISE = """
    add.Tensor sub.Tensor mul.Tensor div.Tensor maximum minimum addcmul addcdiv lerp.Tensor
    pow.Tensor_Scalar pow.Tensor_Tensor neg exp exp2 log log1p expm1 sqrt rsqrt reciprocal sin cos
    tanh sigmoid erf atan abs sign floor ceil round where.self gelu silu clamp clamp_min clamp_max
    tanh_backward sigmoid_backward gelu_backward silu_backward threshold_backward elu_backward
    hardtanh_backward leaky_relu_backward softplus_backward
    """
# Row by row: each row is read to its end before it is written, by one thread. So it is on the CPU
# (aten/src/ATen/native/cpu/SoftMaxKernel.cpp); of other devices' kernels nothing is known.
_ROWWISE_ON_CPU = "_softmax _log_softmax _softmax_backward_data _log_softmax_backward_data"
# Normalisations whose results lie otherwise than their fake tensors say (torch 2.13, CPU): some in
# rows, whatever they are given, some like one of their inputs, or in rows where that has no format.
_NORMS_IN_ROWS = """
    native_layer_norm native_layer_norm_backward native_group_norm native_group_norm_backward
    _fused_rms_norm _fused_rms_norm_backward
    """
_NORMS_LIKE_AN_INPUT = """
    native_batch_norm native_batch_norm_backward _native_batch_norm_legit
    _native_batch_norm_legit_functional _native_batch_norm_legit_no_training
    _batch_norm_with_update _batch_norm_with_update_functional batch_norm_backward
    """
# Ops whose results lie in rows, whatever they are given.
_LAYS_OUT_IN_ROWS = """
    mm addmm bmm baddbmm _grouped_mm sum mean var embedding embedding_dense_backward full zeros ones
    select_backward slice_backward nll_loss_backward nll_loss2d_backward
    """
#: On a node whose result may lie in memory otherwise than its fake tensor says.
UNCERTAIN = "ckpt_pass_uncertain_layout"
# What these make is memory of its own: functional ops whose kernels never return an input. The list
# is closed because some do (`native_dropout` with nothing to drop, `copy`).
_MAKES_ANEW = """
    mm addmm bmm baddbmm _grouped_mm convolution convolution_backward clone _to_copy sum mean var
    native_layer_norm native_layer_norm_backward native_group_norm native_group_norm_backward
    native_batch_norm native_batch_norm_backward _fused_rms_norm _fused_rms_norm_backward cat stack
    embedding embedding_dense_backward full full_like zeros zeros_like ones_like gather index
    index_select index_put scatter scatter_add slice_backward select_backward constant_pad_nd
    native_dropout_backward nll_loss_backward nll_loss2d_backward max_pool2d_with_indices_backward
    avg_pool2d_backward _adaptive_avg_pool2d_backward masked_fill relu leaky_relu
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention_for_cpu_backward
    """


def overwriting_variant(node: fx.Node) -> OpOverload | None:
    """The op that writes a node's result into a tensor that it is given; ``None`` if none does."""
    if not isinstance(node.target, OpOverload) or not isinstance(
        node.meta.get("val"), torch.Tensor
    ):
        return None
    device = node.meta["val"].device.type
    found = _variants().get(node.target)
    if found is None or not has_own_kernel(found[0], device):
        return None
    variant, rowwise = found
    return None if rowwise and device != "cpu" else variant


def overwritable_inputs(node: fx.Node) -> Iterator[fx.Node]:
    """The inputs whose memory the result of a node may take, if it is theirs alone by then.

    Such an input has the result's dtype, shape and strides, fills its storage, and is no other view
    of a storage that the node reads in another way as well.
    """
    if overwriting_variant(node) is None:
        return
    value = node.meta["val"]
    layout = _layout(value)
    tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    if any(n.meta.get(UNCERTAIN) for n in tensors):
        return
    if not layout or any(_would_be_cast(n.meta["val"], value) for n in tensors):
        return
    for source in tensors:
        other = source.meta["val"]
        if other.dtype == value.dtype and _layout(other) == layout:
            memory = _memory(other)
            if [n for n in tensors if _memory(n.meta["val"]) & memory] == [source]:
                yield source


def _memory(value: torch.Tensor) -> set[int]:
    """What is behind a tensor: of a sparse one, its indices and values."""
    return {storage._cdata for storage in functorch.storages_of(value)}


def note_uncertain_layouts(nodes: Iterable[fx.Node]) -> None:
    """Mark the nodes of a graph whose real strides may be others than their fake ones.

    To write over such a value could give an op's result another layout than it has by itself, and
    what sums it up another order: other bits.
    """
    for node in nodes:
        if node.op != "call_function" or node.target in _named(_LAYS_OUT_IN_ROWS):
            continue
        if _lies_anew(node) or any(given.meta.get(UNCERTAIN) for given in node.all_input_nodes):
            node.meta[UNCERTAIN] = True


def _lies_anew(node: fx.Node) -> bool:
    """Whether a normalisation is given what lies neither in rows nor with its channels last."""
    in_rows = node.target in _named(_NORMS_IN_ROWS)
    if not in_rows and node.target not in _named(_NORMS_LIKE_AN_INPUT):
        return False
    values = (given.meta.get("val") for given in node.all_input_nodes)
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    dims = max((tensor.dim() for tensor in tensors), default=0)
    whole = [tensor for tensor in tensors if tensor.dim() == dims]
    orders = [[*range(dims)]]
    if not in_rows and dims in (4, 5):  # those that have such a format
        orders.append([0, *range(2, dims), 1])
    return not any(all(_lies(tensor, order) for tensor in whole) for order in orders)


def _lies(tensor: torch.Tensor, order: Sequence[int]) -> bool:
    """Whether a tensor is dense in an order of its dimensions, the last one next to each other."""
    count: Any = 1
    for dim in reversed(order):
        size = as_bytes(tensor.shape[dim])
        if size != 1 and as_bytes(tensor.stride(dim)) != count:
            return False
        count = count * size
    return True


def is_elementwise(op: object) -> bool:
    """Whether an op is one of those whose kernel goes element by element (``_ELEMENTWISE``)."""
    variant = _variants().get(op) if isinstance(op, OpOverload) else None
    return variant is not None and not variant[1]


def makes_anew(node: fx.Node) -> bool:
    """Whether the memory of a node's result is surely its own, whatever its kernel does."""
    if node.op == "call_function" and node.target is operator.getitem:
        return makes_anew(node.args[0])  # type: ignore[arg-type]
    return isinstance(node.target, OpOverload) and node.target in _makers()


def _would_be_cast(argument: torch.Tensor, result: torch.Tensor) -> bool:
    """Whether a kernel would cast an argument first; numbers and masks it takes as they are."""
    return argument.dim() > 0 and argument.dtype not in (result.dtype, torch.bool)


def _layout(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """Shape, strides and device of a tensor that fills its storage; ``None`` for others."""
    if tensor.layout is not torch.strided or tensor.is_complex():
        return None
    sizes = tuple(as_bytes(size) for size in tensor.shape)
    strides = tuple(as_bytes(stride) for stride in tensor.stride())
    nbytes = as_bytes(tensor.untyped_storage().nbytes())
    if as_bytes(tensor.storage_offset()) != 0 or nbytes != as_bytes(
        tensor.numel() * tensor.dtype.itemsize
    ):
        return None
    return (sizes, strides, tensor.device)


@functools.cache
def _variants() -> dict[OpOverload, tuple[OpOverload, bool]]:
    """Functional op -> (the op that writes into a given tensor, whether it goes row by row)."""
    found = {}
    for names, rowwise in ((_ELEMENTWISE, False), (_ROWWISE_ON_CPU, True)):
        for op in _overloads(names.split()):
            variant = _out_variant(op)
            if variant is not None:
                found[op] = (variant, rowwise)
    return found


def _out_variant(op: OpOverload) -> OpOverload | None:
    """The variant of an op with the same arguments and one more, which it writes."""
    wanted = [(a.name, str(a.type)) for a in op._schema.arguments]
    for other in overloads_of(op.overloadpacket):
        written = [a for a in other._schema.arguments if a.is_out]
        taken = [(a.name, str(a.type)) for a in other._schema.arguments if not a.is_out]
        if len(written) == 1 and taken == wanted:
            return other
    return None


@functools.cache
def _named(names: str) -> frozenset[OpOverload]:
    return frozenset(op for base in names.split() for op in _functional_overloads(base))


@functools.cache
def _makers() -> frozenset[OpOverload]:
    named = " ".join((_ELEMENTWISE, _ROWWISE_ON_CPU, _MAKES_ANEW)).split()
    bases = {name.partition(".")[0] for name in named}
    return frozenset(op for base in bases for op in _functional_overloads(base))


def _overloads(names: Iterable[str]) -> Iterator[OpOverload]:
    for name in names:
        base, _, overload = name.partition(".")
        op = op_overload("aten", base, overload or "default")
        if op is not None:
            yield op


def _functional_overloads(base: str) -> Iterator[OpOverload]:
    packet = packet_of("aten", base)
    for op in overloads_of(packet) if packet is not None else ():
        if not op._schema.is_mutable:
            yield op
