"""Calls of ops as nodes of a graph, with tensors of their own: what kernels are measured by.

A node holds no tensor of the step, so that it keeps nothing alive; equal calls are one node.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_map_only

from ckpt_pass._torch import functorch
from ckpt_pass.graph.kernel_call import (
    MADE_BY,
    WITH_GRAD,
    copies_all_memory,
    only_its_maker_knows,
)
from ckpt_pass.ops.taxonomy import OpClass, classify
from ckpt_pass.policy.sites import optimization_hint

MadeBy: TypeAlias = tuple[fx.Node, int]
"""The call that made a value, and which of its outputs that is."""


class Calls:
    """Writes calls down.

    Args:
        fake: the mode of the tensors that stand in the nodes.
    """

    def __init__(self, fake: functorch.FakeTensorMode) -> None:
        self._fake = fake
        self._graph = fx.Graph()
        self._nodes: dict[Any, fx.Node] = {}
        self._opaque: dict[int, MadeBy] = {}

    def node(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> fx.Node:
        """The node that stands for a call and all equal ones."""
        given = (args, dict(kwargs))
        flat, spec = tree_flatten(given)
        memory = _memory_behind(args[0]) if args and copies_all_memory(func) else 0
        looks = tuple((_described(value), self.maker_of(value)) for value in flat)
        key = (func, spec, looks, memory)
        found = self._nodes.get(key)
        if found is None:
            with self._fake:
                found = self._nodes[key] = self._made(func, given, output)
        return found

    def _made(self, func: Any, given: tuple[Any, Any], output: Any) -> fx.Node:
        def placeholder(value: Tensor) -> fx.Node:
            node = self._graph.placeholder(f"value_{len(self._graph.nodes)}")
            node.meta["val"] = fake_like(value)
            if copies_all_memory(func) and value is given[0][0]:
                functorch.resize_fake_storage(node.meta["val"], _memory_behind(value))
            made_by = self.maker_of(value)
            if made_by is not None:
                node.meta[MADE_BY] = made_by
            return node

        call = self._graph.call_function(func, *tree_map_only(Tensor, placeholder, given))
        self._look(call, output)
        if classify(func) is OpClass.RECURRENT:
            call.meta[WITH_GRAD] = torch.is_grad_enabled()
        return call

    def returns(self, call: fx.Node, output: Any) -> None:
        """Note what a call returns, where that looks otherwise than was written down."""
        with self._fake:
            self._look(call, output)

    @staticmethod
    def _look(call: fx.Node, output: Any) -> None:
        call.meta["val"] = tree_map_only(Tensor, fake_like, output)

    def note_outputs(self, call: fx.Node, output: Any) -> None:
        """Remember which call made what only kernels can read: an LSTM's bytes, a seed."""
        if isinstance(output, (tuple, list)):
            for index, value in enumerate(output):
                if index and isinstance(value, Tensor) and only_its_maker_knows(value):
                    self.note_maker(value, (call, index))

    def note_maker(self, value: Tensor, made_by: MadeBy) -> None:
        """The same for one value, as long as it lives."""
        storage = value.untyped_storage()
        self._opaque[storage._cdata] = made_by
        weakref.finalize(storage, self._opaque.pop, storage._cdata, None)

    def maker_of(self, value: Any) -> MadeBy | None:
        """Which call made such a value; ``None`` for all others."""
        if not isinstance(value, Tensor) or not only_its_maker_knows(value):
            return None
        return self._opaque.get(value.untyped_storage()._cdata)


def _memory_behind(value: Any) -> int:
    strided = isinstance(value, Tensor) and value.layout is torch.strided
    return optimization_hint(value.untyped_storage().nbytes()) if strided else 0


def _described(value: Any) -> object:
    if isinstance(value, Tensor):
        stride = value.stride() if value.layout is torch.strided else value.layout
        read = value.is_conj(), value.is_neg()
        return tuple(value.shape), stride, value.dtype, value.device, read
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return type(value), value


def fake_like(value: Any) -> Any:
    """A tensor of the same look with a storage of its own, symbolic sizes at their traced values.

    Of a sparse tensor an empty one. Other values are themselves.
    """
    if isinstance(value, torch.SymInt):
        return optimization_hint(value)
    if isinstance(value, (torch.SymFloat, torch.SymBool)):
        return value.node.hint
    if not isinstance(value, Tensor):
        return value
    if value.layout is not torch.strided:
        return torch.empty(value.shape, dtype=value.dtype, device=value.device, layout=value.layout)
    size, stride = ([*map(optimization_hint, part)] for part in (value.shape, value.stride()))
    return _strided(value, size, stride)


def open_like(value: Any) -> Any:
    """As :func:`fake_like`, with symbolic sizes as they are."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return value if isinstance(value, torch.SymInt) else fake_like(value)
    return _strided(value, value.shape, value.stride())


def _strided(value: Tensor, size: Sequence[Any], stride: Sequence[Any]) -> Tensor:
    found = torch.empty_strided(size, stride, dtype=value.dtype, device=value.device)
    found = torch._neg_view(found) if value.is_neg() else found
    return found.conj() if value.is_conj() else found
