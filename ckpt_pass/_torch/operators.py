"""The registry half of the private front door: every operator that the installed torch knows.

Public torch offers operators one at a time (``torch.ops.aten.mm.default``) but no list of them and
no public name for their types. Both come from private modules, and are touched only here.
"""

from __future__ import annotations

import functools
import importlib
import operator
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch._ops import OpOverloadPacket as OpOverloadPacket

# Bound on cached answers: four registries' worth (torch 2.13 has 3,675 overloads).
CACHE_SIZE = 16_384


#: Imported by the first jagged nested tensor; its import logs a warning.
_NESTED = "torch.nested._internal.nested_tensor"


def is_nested(kind: type) -> bool:
    """Whether a class is that of jagged nested tensors."""
    module = sys.modules.get(_NESTED)
    return module is not None and issubclass(kind, module.NestedTensor)


def was_nested_by(tensor: torch.Tensor) -> bool:
    """Whether a jagged nested tensor was made with these offsets, which have been noted since."""
    module = sys.modules.get(_NESTED)
    return module is not None and tensor in module._tensor_symint_registry


# Modules that register operators when they are first imported. Without them the registry of a
# process depends on what ran before; each may be absent in some build or version of torch.
LATE_MODULES: tuple[str, ...] = (
    "torch._higher_order_ops",
    "torch._higher_order_ops.register_hook",
    "torch._higher_order_ops.triton_kernel_wrap",
    "torch._inductor.inductor_prims",
    "torch._inductor.lowering",
    "torch._prims.rng_prims",
    "torch.ao.quantization.fx._decomposed",
    "torch.distributed._functional_collectives",
    "torch.distributed._symmetric_memory",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.nn.attention.flex_attention",
    "torch.nn.attention.varlen",
    "torch.onnx.ops",
)


def load_late_registrations() -> tuple[str, ...]:
    """Import the modules that register operators late; return those that could be imported.

    Takes a few seconds the first time. A module that this build of torch lacks is skipped.
    """
    loaded = []
    for name in LATE_MODULES:
        try:
            importlib.import_module(name)
        except ImportError:  # another version of torch, or one built without distributed
            continue
        loaded.append(name)
    return tuple(loaded)


def packet_of(namespace: str, base: str) -> OpOverloadPacket | None:
    """Return ``torch.ops.<namespace>.<base>``, or None where no such operator is registered."""
    packet = getattr(getattr(torch.ops, namespace), base, None)
    return packet if isinstance(packet, OpOverloadPacket) else None


def op_overload(namespace: str, base: str, overload: str) -> OpOverload | None:
    """Return one overload, or None where this torch has no such op."""
    op = getattr(packet_of(namespace, base), overload, None)
    return op if isinstance(op, OpOverload) else None


def has_own_kernel(op: OpOverload, device_type: str) -> bool:
    """Whether a device has a kernel for an op, not one made of others that allocate."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and bool(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key))


def overloads_of(packet: OpOverloadPacket) -> Iterator[OpOverload]:
    """Yield the packet's overloads, TorchScript's own ones for numbers and lists included."""
    for name in packet.overloads():
        op = getattr(packet, name)
        if isinstance(op, OpOverload):
            yield op


def split_name(qualified: str) -> tuple[str, str, str]:
    """Split ``"aten::add.Tensor"`` into namespace, base and overload (``"default"`` if none)."""
    namespace, _, rest = qualified.partition("::")
    base, _, overload = rest.partition(".")
    return namespace, base, overload or "default"


def all_overloads() -> list[OpOverload]:
    """Return every overload that the dispatcher knows at this moment, sorted by name.

    Source: ``torch._C._dispatch_get_all_op_names``. A name that has lost its Python binding
    (its library was torn down) does not resolve and is left out. Call
    ``load_late_registrations`` first for a list that does not depend on what ran before.
    """
    found = []
    for qualified in sorted(torch._C._dispatch_get_all_op_names()):
        namespace, base, overload = split_name(qualified)
        packet = packet_of(namespace, base)
        op = getattr(packet, overload, None)
        if isinstance(op, OpOverload):
            found.append(op)
    return found


def all_higher_order_ops() -> list[HigherOrderOperator]:
    """Return every higher-order operator created so far, sorted by name."""
    registry = torch._ops._higher_order_ops
    return [registry[name] for name in sorted(registry)]


# What factories take and their `out=` variants do not: the output tensor says it.
_TENSOR_OPTIONS = frozenset({"dtype", "layout", "device", "pin_memory"})


def _signature(op: OpOverload) -> list[tuple[str, str]]:
    """Names and types of the arguments, without ``out=`` ones."""
    return [(arg.name, str(arg.type)) for arg in op._schema.arguments if not arg.is_out]


def _without_options(op: OpOverload) -> list[tuple[str, str]]:
    return [row for row in _signature(op) if row[0] not in _TENSOR_OPTIONS]


def _types(op: OpOverload) -> list[str]:
    return [kind for _, kind in _signature(op)]


# Ways for two overloads to take the same arguments, the strictest first.
_SAME_ARGUMENTS: tuple[Callable[[OpOverload], Sequence[object]], ...] = (
    _signature,
    _without_options,
    _types,
)


def _functional_candidates(op: OpOverload) -> Iterator[OpOverload]:
    """Yield the non-mutating overloads whose name says that they are ``op`` without mutation."""
    namespace, base, _ = split_name(op.name())
    inplace_dunder = re.fullmatch(r"__i(\w+)__", base)
    stem = f"__{inplace_dunder[1]}__" if inplace_dunder else base.removesuffix("_")
    for name in (stem, f"{stem}_functional", stem.removesuffix("_out")):
        packet = packet_of(namespace, name)
        if packet is not None:
            yield from (twin for twin in overloads_of(packet) if not twin._schema.is_mutable)


def _unmutating(op: OpOverload) -> OpOverload:
    """Return the functional overload whose arguments match ``op``'s best, else ``op`` itself.

    The same names and types, less ``out=``, are looked for first; then the same without what a
    factory takes and its ``out=`` variant does not; then the same types.
    """
    candidates = list(_functional_candidates(op))
    for arguments in _SAME_ARGUMENTS:
        wanted = arguments(op)
        for twin in candidates:
            if arguments(twin) == wanted:
                return twin
    return op


@functools.lru_cache(maxsize=CACHE_SIZE)
def functional_overload(op: OpOverload) -> OpOverload:
    """Return the overload that a functionalised graph has in the place of ``op``; cached."""
    twin = _unmutating(op) if op._schema.is_mutable else op
    # functionalised graphs spell the view that a reshape ends in either way
    return torch.ops.aten.view.default if twin is torch.ops.aten._unsafe_view.default else twin


@functools.lru_cache(maxsize=CACHE_SIZE)
def arguments_of(op: OpOverload) -> dict[str, tuple[int, Any]]:
    """Return position and default (None if it has none) of each argument, by name; cached."""
    return {arg.name: (i, arg.default_value) for i, arg in enumerate(op._schema.arguments)}


def argument_value(
    op: OpOverload, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Return an argument of a call by name: from the call, else the default, else None."""
    index, default = arguments_of(op).get(name, (len(args), None))
    return args[index] if index < len(args) else kwargs.get(name, default)


def _subgraph_of(value: object) -> torch.fx.GraphModule | None:
    """The graph module that an argument is, or that a ``get_attr`` node stands for."""
    if isinstance(value, torch.fx.Node) and value.op == "get_attr":
        root = value.graph.owning_module
        value = None if root is None else operator.attrgetter(str(value.target))(root)
    return value if isinstance(value, torch.fx.GraphModule) else None


def _leaves(value: object) -> Iterator[object]:
    """Yield what nested lists, tuples and dicts hold."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def subgraphs(value: object) -> Iterator[torch.fx.GraphModule]:
    """Yield the graphs among the arguments of a higher-order op, nested containers included."""
    yield from filter(None, map(_subgraph_of, _leaves(value)))
