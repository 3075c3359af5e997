"""Let ops of a backward graph write over values that nothing reads afterwards.

The planner counts on it (:attr:`ckpt_pass.planner.problem.Op.overwrites`), but what is safe is
found here anew, on the graph that runs: which values are views of which, and where each is read
last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from ckpt_pass._torch import functorch
from ckpt_pass._torch.batched import FUNCTIONAL
from ckpt_pass.graph.joint import is_multi_output_access, storage_keys
from ckpt_pass.graph.reinplace import makes_anew, overwritable_inputs, overwriting_variant
from ckpt_pass.policy.sites import output_tensors


def overwrite_in_place(module: fx.GraphModule) -> int:
    """Rewrite a backward graph, in place; returns how many ops now write over an input.

    Args:
        module: the backward, in its final order. Its inputs (saved activations, parameters,
            tangents) and outputs are left alone.
    """
    memory = _Memory.of(module.graph)
    count = 0
    for place, node in enumerate(list(module.graph.nodes)):
        target = overwriting_variant(node) if node.op == "call_function" else None
        if target is None:
            continue
        for source in overwritable_inputs(node):
            base = memory.base[source]
            if base in memory.own and memory.last[base] == place:
                _write_over(node, target, source)
                count += 1
                break
    if count:
        module.recompile()
    return count


@dataclass(frozen=True)
class _Memory:
    """Who has allocated what each node holds, and where that is read last.

    Attributes:
        base: for each node, the one whose memory it is, itself or another one.
        last: for each base, the place of the last node that reads it, through views too, or
            through a sparse tensor that it is a part of.
        own: bases that certainly are memory of their own.
    """

    base: dict[fx.Node, fx.Node] = field(default_factory=dict)
    last: dict[fx.Node, int] = field(default_factory=dict)
    own: set[fx.Node] = field(default_factory=set)

    @classmethod
    def of(cls, graph: fx.Graph) -> _Memory:
        """Read a graph. A node that stands in it twice holds other memory each time."""
        found = cls()
        outputs: dict[object, fx.Node] = {}  # of ops with several: the first access to each
        parts: dict[fx.Node, list[fx.Node]] = {}  # of sparse tensors: the bases of their values
        for place, node in enumerate(graph.nodes):
            base = found.base[node] = found._owner(node, outputs)
            if base is node and makes_anew(node):
                found.own.add(node)
            parts[node] = list(found._parts(node, parts))
            for source in (node, *node.all_input_nodes):
                for base in (found.base[source], *parts[source]):
                    found.last[base] = place
        return found

    def _parts(self, node: fx.Node, known: dict[fx.Node, list[fx.Node]]) -> Iterator[fx.Node]:
        """Whose memory a node's value lies in by way of a sparse tensor."""
        for source in node.all_input_nodes:
            shared = _storages(source) & _storages(node)
            if shared or _is_sparse(node):
                yield from known[source]
            if shared and (_is_sparse(node) or _is_sparse(source)):
                yield self.base[source]

    def _owner(self, node: fx.Node, outputs: dict[object, fx.Node]) -> fx.Node:
        keys = set(storage_keys(node.meta.get("val")))
        shared = [n for n in node.all_input_nodes if keys & set(storage_keys(n.meta.get("val")))]
        if not shared or len(keys) != 1:
            return node
        source = shared[0]
        apart = is_multi_output_access(node) and len(set(storage_keys(source.meta["val"]))) > 1
        if apart and self.base[source] is source:
            return outputs.setdefault((source, *keys), node)
        return self.base[source]


def _is_sparse(node: fx.Node) -> bool:
    """Whether a node's value is made of other tensors, indices and values say."""
    found = output_tensors(node.meta.get("val"))
    return any(tensor.layout is not torch.strided for tensor in found)


def _storages(node: fx.Node) -> set[int]:
    found = output_tensors(node.meta.get("val"))
    return {storage._cdata for tensor in found for storage in functorch.storages_of(tensor)}


def _write_over(node: fx.Node, target: object, source: fx.Node) -> None:
    out = next(a.name for a in target._schema.arguments if a.is_out)  # type: ignore[attr-defined]
    node.meta[FUNCTIONAL] = node.target, out
    node.target = target  # type: ignore[assignment]
    node.kwargs = {**node.kwargs, out: source}
