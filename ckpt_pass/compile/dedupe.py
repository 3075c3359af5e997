"""Compute equal values once.

Two calls of one op with the same arguments give the same value: an attention mask that every layer
turns into numbers anew, say. torch's own partitioner merges them before it decides (its graph pass
for common subexpressions); so does this, after the policy was asked, so that call sites count as
the program has them. Only forward ops with the same tag in the same kind of region are merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from ckpt_pass._torch.operators import OpOverload
from ckpt_pass.compile.tagging import Tag
from ckpt_pass.graph.joint import JointGraph, is_multi_output_access, storage_keys
from ckpt_pass.ops.taxonomy import draws_random, never_recompute


def merge_equal(joint: JointGraph, tags: dict[fx.Node, Tag]) -> list[tuple[fx.Node, fx.Node]]:
    """Merge equal forward ops in place; merged ones leave ``tags``.

    Returns:
        The merged ones, each with the one that stands for it.
    """
    returned = {
        key
        for node in (*joint.forward_outputs, *joint.backward_outputs)
        for key in storage_keys(node.meta.get("val"))
    }
    first: dict[object, fx.Node] = {}
    merged: list[tuple[fx.Node, fx.Node]] = []
    for node in joint.forward:
        if not _may_merge(node) or returned.intersection(storage_keys(node.meta.get("val"))):
            continue
        other = first.setdefault(_key(node), node)
        if other is not node:
            node.replace_all_uses_with(other)
            merged.append((node, other))
    _erase(joint, tags, merged)
    return merged


def merge_listed(
    joint: JointGraph, tags: dict[fx.Node, Tag], merged: Sequence[tuple[fx.Node, fx.Node]]
) -> None:
    """Merge pairs that were found before."""
    for node, other in merged:
        node.replace_all_uses_with(other)
    _erase(joint, tags, merged)


def _erase(
    joint: JointGraph, tags: dict[fx.Node, Tag], merged: Sequence[tuple[fx.Node, fx.Node]]
) -> None:
    for node, _ in reversed(merged):
        tags.pop(node, None)
        joint.module.graph.erase_node(node)
    if merged:
        joint.module.recompile()
        joint.refresh()


def _may_merge(node: fx.Node) -> bool:
    target = node.target
    if is_multi_output_access(node):
        return True
    return isinstance(target, OpOverload) and not (
        never_recompute(target, node.args, node.kwargs)
        or draws_random(target, node.args, node.kwargs)
        or target._schema.is_mutable
        or node.is_impure()
    )


def _key(node: fx.Node) -> object:
    return (
        node.target,
        node.meta.get("recompute"),
        node.meta.get("ac_graph_id"),
        _frozen(node.args),
        _frozen(node.kwargs),
    )


def _frozen(value: Any) -> object:
    """Arguments as a key; numbers with their type, since 1, 1.0 and True are equal."""
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in sorted(value.items()))
    return value if isinstance(value, fx.Node) else (type(value), repr(value))
