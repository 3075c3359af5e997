"""The order of the backward: recomputed values appear just before their first use.

Nodes that depend on a tangent keep their order. Every other node (recomputed forward ops, and
backward ops that need no tangent, such as the transpose of a weight) stands just before its first
consumer, and within such a group in the order it had. Anything else would make all of the
recomputation happen first and stay alive at once.
"""

from __future__ import annotations

from torch import fx

from ckpt_pass import _torch


def backward_order(graph: fx.Graph) -> list[fx.Node]:
    """The nodes of a backward graph in the order described above; linear in nodes and edges."""
    nodes = list(graph.nodes)
    position = {node: index for index, node in enumerate(nodes)}
    order: dict[fx.Node, None] = {node: None for node in nodes if node.op == "placeholder"}
    late: set[fx.Node] = {node for node in order if _torch.is_backward_input(node)}
    for node in nodes:
        if node in order:
            continue
        if any(source in late for source in node.all_input_nodes):
            late.add(node)
        anchored = node in late or node.op == "output" or node.is_impure(impure_random=False)
        if anchored:
            missing = _missing_sources(node, order)
            order.update(dict.fromkeys(sorted(missing, key=position.__getitem__)))
            order[node] = None
    order.update(dict.fromkeys(nodes))  # nodes without a consumer keep their place at the end
    output = nodes[-1]
    order.pop(output)
    return [*order, output]


def _missing_sources(node: fx.Node, placed: dict[fx.Node, None]) -> set[fx.Node]:
    """Everything that ``node`` needs, directly or not, that has no place yet."""
    missing: set[fx.Node] = set()
    stack = list(node.all_input_nodes)
    while stack:
        source = stack.pop()
        if source not in placed and source not in missing:
            missing.add(source)
            stack.extend(source.all_input_nodes)
    return missing


def schedule_backward(graph: fx.Graph) -> None:
    """Reorder a backward graph in place."""
    order = backward_order(graph)
    output = order[-1]
    for node in order[:-1]:
        output.prepend(node)
    graph.lint()
