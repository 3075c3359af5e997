"""Bytes of values in a graph: by storage, exact, symbolic where sizes are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import fx

from ckpt_pass.graph.joint import JointGraph, StorageKey
from ckpt_pass.sites import Bytes, output_tensors


def as_bytes(size: int | torch.SymInt) -> Bytes:
    """A size as a number, or as an expression when it is symbolic."""
    if isinstance(size, torch.SymInt):
        expression = sympy.sympify(size.node.expr)
        return int(expression) if expression.is_number else expression
    return int(size)


def storages(value: Any) -> dict[StorageKey, Bytes]:
    """The storages behind a node's value and the bytes of each."""
    found: dict[StorageKey, Bytes] = {}
    for tensor in output_tensors(value):
        storage = tensor.untyped_storage()
        found[storage._cdata] = as_bytes(storage.nbytes())
    return found


def own_bytes(joint: JointGraph, node: fx.Node) -> Bytes:
    """Bytes of the storages that this op allocates; 0 for views."""
    total: Bytes = 0
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return sum(storages(value).values()) if joint.owner(node) is node else 0
    for nbytes in storages(value).values():
        total = total + nbytes
    return total


def held_bytes(nodes: Iterable[fx.Node], besides: Iterable[fx.Node] = ()) -> Bytes:
    """Bytes of the distinct storages of ``nodes`` that are not storages of ``besides``."""
    known = {key for node in besides for key in storages(node.meta.get("val"))}
    total: Bytes = 0
    for node in nodes:
        for key, nbytes in storages(node.meta.get("val")).items():
            if key not in known:
                known.add(key)
                total = total + nbytes
    return total
