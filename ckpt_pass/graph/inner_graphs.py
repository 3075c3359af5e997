"""Higher-order ops that run graphs of their own (``torch.cond``): what these allocate inside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import fx

from ckpt_pass.graph.cost import at_traced_shape, storage_sizes
from ckpt_pass.planner.caching_allocator import Lifetime, added_up

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
    nodes = list(graph.nodes)
    place = {node: number for number, node in enumerate(nodes)}
    lifetimes: dict[object, Lifetime] = {}
    for node in nodes:
        died = 1 + max(place[user] for user in (node, *node.users))
        for key, size in storage_sizes(node.meta.get("val")).items():
            nbytes = 0 if node.op == "placeholder" else at_traced_shape(size)
            one = lifetimes.setdefault(key, Lifetime(place[node], died, nbytes))
            lifetimes[key] = replace(one, died=max(one.died, died))
    while_running = {place[node]: nbytes for node, nbytes in workspaces.items() if node in place}
    return max(added_up(lifetimes.values(), while_running, len(nodes)), default=0)
