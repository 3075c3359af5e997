"""Give a backward graph the order of a plan.

The planner says in which order the backward runs its ops (:mod:`ckpt_pass.planner.schedule`): what
is recomputed stands just before its first use, and again before a later one where it was dropped.
FX frees a value after its last use, so that the order is all that has to be written.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx


def reorder(graph: fx.Graph, order: Sequence[fx.Node]) -> list[fx.Node]:
    """Bring a graph into an order, in place; a node that is listed again is copied.

    Args:
        graph: the backward's graph.
        order: its nodes, without placeholders and output. What the order does not mention (sizes,
            effects) is put where it is first needed, or at the end.

    Returns:
        What stands in the graph for each of ``order``: the node, or its copy.
    """
    nodes = list(graph.nodes)
    writer = _Writer(graph, nodes)
    written = []
    for node in order:
        writer.need(node)
        writer.write(node)
        written.append(writer.latest[node])
    for node in nodes[:-1]:
        if node not in writer.latest:
            writer.need(node)
            writer.write(node)
    writer.redirect(nodes[-1])
    graph.lint()
    return written


class _Writer:
    """Writes the nodes of a graph anew, before its output."""

    def __init__(self, graph: fx.Graph, nodes: list[fx.Node]) -> None:
        self._graph, self._output = graph, nodes[-1]
        self._position = {node: place for place, node in enumerate(nodes)}
        self._origin: dict[fx.Node, fx.Node] = {}
        #: What a node's users are to read: the node itself, or its newest copy.
        self.latest = {node: node for node in nodes if node.op == "placeholder"}

    def write(self, node: fx.Node) -> None:
        """Put ``node`` next, or a copy of it where it stands already."""
        if node in self.latest:
            with self._graph.inserting_before(self._output):
                copy = self._graph.node_copy(node, self._newest)
            self._origin[copy] = node
            self.latest[node] = copy
        else:
            self.redirect(node)
            self._output.prepend(node)
            self.latest[node] = node

    def redirect(self, node: fx.Node) -> None:
        """Let a node read the newest copies."""
        for source in node.all_input_nodes:
            if self._newest(source) is not source:
                node.replace_input_with(source, self._newest(source))

    def _newest(self, source: fx.Node) -> fx.Node:
        return self.latest[self._origin.get(source, source)]

    def need(self, node: fx.Node) -> None:
        """Put everything before that ``node`` reads, directly or not, and that has no place."""
        missing: set[fx.Node] = set()
        stack = list(node.all_input_nodes)
        while stack:
            source = stack.pop()
            if self._origin.get(source, source) not in self.latest and source not in missing:
                missing.add(source)
                stack.extend(source.all_input_nodes)
        for source in sorted(missing, key=self._position.__getitem__):
            self.write(source)
