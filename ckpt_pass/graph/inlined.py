"""Which values of a graph inductor computes where they are read, so that they take no memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ckpt_pass._torch.fusion import fuses, is_heavy, is_inlined
from ckpt_pass.graph.joint import JointGraph
from ckpt_pass.ops.taxonomy import draws_random, never_recompute
from ckpt_pass.planner.inlined import Inlinable

_SAVED = (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_CPU_OFFLOAD)


def inlined_ops(joint: JointGraph, index: Mapping[fx.Node, int]) -> dict[int, Inlinable]:
    """The ops that are elementwise and whose results are read by fused kernels alone."""
    kept = {joint.owner(n) for n in (*joint.forward_outputs, *joint.backward_outputs)}
    kept.update(joint.owner(n) for n in joint.written_in_backward)
    found = {}
    for node, number in index.items():
        if node in kept or not _is_elementwise(joint, node):
            continue
        readers = [*_readers(joint, node)]
        if readers and all(fuses(reader.target) for reader in readers):
            on_cpu = node.meta["val"].device.type == "cpu"
            found[number] = Inlinable(len(readers), heavy=on_cpu and is_heavy(node.target))
    return found


def _is_elementwise(joint: JointGraph, node: fx.Node) -> bool:
    """Whether a node's result is one of its own, made element by element, and open to a plan."""
    if not isinstance(node.meta.get("val"), torch.Tensor) or joint.owner(node) is not node:
        return False
    if node.meta.get("recompute") in _SAVED or not is_inlined(node.target):
        return False
    assert callable(node.target)
    call = node.target, node.args, node.kwargs
    return not (draws_random(*call) or never_recompute(*call))


def _readers(joint: JointGraph, node: fx.Node) -> Iterator[fx.Node]:
    """The ops that read a value, through views too."""
    stack, seen = [node], {node}
    while stack:
        for user in stack.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if user.op == "output" or joint.owner(user) is not node:
                yield user
            else:
                stack.append(user)
