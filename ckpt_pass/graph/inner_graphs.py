"""Higher-order ops that run graphs of their own (``torch.cond``): what these allocate inside."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from ckpt_pass.graph.cost import at_traced_shape, storage_sizes

#: Those that run one graph once, and return what it returns. Others loop: they hold what earlier
#: rounds have returned while the next one runs, and put it together in the end.
_ONCE = frozenset({"cond", "invoke_subgraph"})


def inner_graphs(node: fx.Node) -> list[fx.Graph]:
    """The graphs that an op is given to run; none of most ops."""
    owner = node.graph.owning_module
    names = [given.target for given in node.all_input_nodes if given.op == "get_attr"]
    found = (getattr(owner, str(name), None) for name in names)
    return [module.graph for module in found if isinstance(module, fx.GraphModule)]


def inner_bytes(node: fx.Node, workspaces: Mapping[fx.Node, int]) -> int:
    """The most that an op's graphs hold at once besides what the op returns.

    Args:
        node: the op.
        workspaces: of the kernels in its graphs.
    """
    returned = sum(map(at_traced_shape, storage_sizes(node.meta.get("val")).values()))
    most = max((_most_bytes(graph, workspaces) for graph in inner_graphs(node)), default=0)
    name = getattr(node.target, "_name", "")
    return max(0, most - returned) if name in _ONCE else most + returned


def _most_bytes(graph: fx.Graph, workspaces: Mapping[fx.Node, int]) -> int:
    """The most bytes that a graph holds while it runs op by op, its inputs not counted."""
    own: dict[object, int] = {}
    last: dict[object, fx.Node] = {}
    for node in graph.nodes:
        for key, size in storage_sizes(node.meta.get("val")).items():
            if node.op == "placeholder":
                own[key] = 0
            own.setdefault(key, at_traced_shape(size))
            for user in (node, *node.users):
                last[key] = max(last.get(key, node), user)
    held = most = 0
    there: set[object] = set()
    for node in graph.nodes:
        new = storage_sizes(node.meta.get("val")).keys() - there
        there |= new
        held += sum(own[key] for key in new)
        most = max(most, held + workspaces.get(node, 0))
        held -= sum(own[key] for key in there if last[key] is node)
        there = {key for key in there if last[key] is not node}
    return most
