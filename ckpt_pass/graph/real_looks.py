"""How tensors of a graph really look, where their fake ones look otherwise.

Kernels do not always return what the rules for fake tensors say: a batch normalisation of a
transposed input is contiguous, statistics of bf16 inputs are fp32, losses lie in storages as large
as their inputs. What was measured says so; here it is carried on to what is made from it, and the
fake storages are given their real sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch.utils._pytree import tree_map_only

from ckpt_pass._torch import functorch
from ckpt_pass.graph.cost import at_traced_shape, storage_sizes
from ckpt_pass.graph.joint import is_multi_output_access
from ckpt_pass.graph.kernel_cache import KernelFacts, OutputFacts
from ckpt_pass.graph.kernel_call import copies_all_memory
from ckpt_pass.policy.sites import optimization_hint, output_tensors


def looks_of(nodes: Sequence[fx.Node], facts: Mapping[fx.Node, KernelFacts]) -> dict[fx.Node, Any]:
    """Tensors without data for the nodes whose fake tensors differ in size, strides or dtype.

    Where a kernel copies all memory behind what it is given, also for those with other memory.

    Args:
        nodes: in the order of their graph.
        facts: what was measured of some of them.
    """
    found: dict[fx.Node, Any] = {}
    memory = any(copies_all_memory(node.target) for node in nodes)
    for node in nodes:
        measured = facts.get(node)
        if measured is not None and measured.outputs:
            if _differ(node.meta.get("val"), measured.outputs, memory):
                found[node] = _as_tensors(node.meta.get("val"), measured.outputs)
        elif any(source in found for source in node.all_input_nodes):
            look = _carried_on(node, found)
            if look is not None:
                found[node] = look
    return found


def _differ(value: Any, outputs: tuple[OutputFacts, ...], memory: bool) -> bool:
    fakes = list(output_tensors(value))
    return len(fakes) == len(outputs) and any(
        (_whole(fake.shape), _whole(fake.stride()), fake.dtype)
        != (real.size, real.stride, getattr(torch, real.dtype))
        or (memory and real.storage_bytes not in (None, _storage_bytes(fake)))
        for fake, real in zip(fakes, outputs, strict=True)
        if fake.numel() or real.storage_bytes
    )


def _whole(sizes: Iterable[int | torch.SymInt]) -> tuple[int, ...]:
    return tuple(map(optimization_hint, sizes))


def _as_tensors(value: Any, outputs: tuple[OutputFacts, ...]) -> Any:
    left = iter(outputs)
    return tree_map_only(torch.Tensor, lambda _: _empty(next(left)), value)


def _empty(output: OutputFacts) -> torch.Tensor:
    """A tensor without data, in as much memory as the real one."""
    dtype = getattr(torch, output.dtype)
    with functorch.real_tensors():
        found = torch.empty_strided(output.size, output.stride, dtype=dtype, device="meta")
        count = (output.storage_bytes or 0) // dtype.itemsize
        if count * dtype.itemsize <= found.untyped_storage().nbytes():
            return found
        memory = torch.empty(count, dtype=dtype, device="meta")
        return memory.as_strided(output.size, output.stride)


def _storage_bytes(tensor: torch.Tensor) -> int:
    strided = tensor.layout is torch.strided
    return optimization_hint(tensor.untyped_storage().nbytes()) if strided else 0


def _carried_on(node: fx.Node, found: Mapping[fx.Node, Any]) -> Any:
    """What an op that was not measured (a view, say) makes of what really comes in."""

    def given(source: fx.Node) -> Any:
        if source in found:
            return found[source]
        return tree_map_only(torch.Tensor, _described, source.meta.get("val"))

    args, kwargs = cast(
        "tuple[tuple[Any, ...], dict[str, Any]]", fx.map_arg((node.args, node.kwargs), given)
    )
    if is_multi_output_access(node):
        return args[0][args[1]]
    args, kwargs = tree_map_only(torch.SymInt, optimization_hint, (args, kwargs))
    assert callable(node.target)
    try:
        with functorch.real_tensors():
            return node.target(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError):
        return None  # the op will fail in the step too, or takes more than tensors without data


def _described(value: torch.Tensor) -> torch.Tensor:
    return _empty(
        OutputFacts(
            _whole(value.shape),
            _whole(value.stride()),
            str(value.dtype).removeprefix("torch."),
            _storage_bytes(value),
        )
    )


def tell_real_sizes(facts: Mapping[fx.Node, KernelFacts]) -> None:
    """Give the storages of fake tensors the sizes that they really have; views see them too."""
    for node, measured in facts.items():
        fakes = list(output_tensors(node.meta.get("val")))
        if measured.outputs is None or len(fakes) != len(measured.outputs):
            continue
        for fake, real in zip(fakes, measured.outputs, strict=True):
            if real.storage_bytes is not None and fake.layout is torch.strided:
                _resize(node, fake, real.storage_bytes)


def _resize(node: fx.Node, fake: torch.Tensor, nbytes: int) -> None:
    size = fake.untyped_storage().nbytes()
    traced = at_traced_shape(size)
    if traced == nbytes:
        return
    if isinstance(size, torch.SymInt):
        share, rest = divmod(nbytes, traced) if traced else (0, nbytes)
        functorch.resize_fake_storage(fake, share * size + rest if share else size + rest - traced)
        return
    for source in node.all_input_nodes:  # what has the size of an input grows as that does
        for given in storage_sizes(source.meta.get("val")).values():
            if isinstance(given, torch.SymInt) and at_traced_shape(given) == nbytes:
                functorch.resize_fake_storage(fake, given)
                return
    functorch.resize_fake_storage(fake, nbytes)
