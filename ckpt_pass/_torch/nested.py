"""Regions that dynamo traces once and calls often (``torch.compiler.nested_compile_region``).

AOTAutograd cuts each such graph into two by itself, with the same partition function, as if it were
the step: no decision about the step is possible then. Their ops are put in the place of the calls.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

_INVOKE = torch.ops.higher_order.invoke_subgraph
_STACK = "nn_module_stack"


def inline_nested_regions(gm: fx.GraphModule) -> None:
    """Put the ops of nested regions in the place of the calls, in a graph of dynamo's.

    The modules that ops belong to are those of the call: dynamo has traced the first one only.
    """
    for module in [m for m in gm.modules() if isinstance(m, fx.GraphModule)]:
        calls = module.graph.find_nodes(op="call_function", target=_INVOKE)
        while calls:
            firsts: dict[object, Mapping[str, Any]] = {}
            for call in calls:
                first = firsts.setdefault(call.args[1], call.meta.get(_STACK) or {})
                _inline(module, call, _Renamed(first, call.meta.get(_STACK) or {}, call.name))
            calls = module.graph.find_nodes(op="call_function", target=_INVOKE)
            if not calls:
                module.graph.lint()
                module.recompile()


def _inline(module: fx.GraphModule, call: fx.Node, renamed: _Renamed) -> None:
    inner = getattr(module, str(call.args[0].target))  # type: ignore[union-attr]
    inputs = iter(call.args[2:])
    values: dict[fx.Node, Any] = {}
    with module.graph.inserting_before(call):
        for node in inner.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(inputs)
            elif node.op == "output":
                _hand_out(module, call, fx.map_arg(node.args[0], values.__getitem__))
            else:
                made = values[node] = module.graph.node_copy(node, values.__getitem__)
                if _STACK in made.meta:
                    made.meta = {**made.meta, _STACK: renamed(made.meta[_STACK])}
                if node.op == "get_attr":
                    made.target = _own_attribute(module, inner, str(node.target))


def _hand_out(module: fx.GraphModule, call: fx.Node, output: Any) -> None:
    for user in list(call.users):
        user.replace_all_uses_with(output[user.args[1]])
        module.graph.erase_node(user)
    module.graph.erase_node(call)
    graph = call.args[0]
    if isinstance(graph, fx.Node) and not graph.users:
        module.graph.erase_node(graph)


def _own_attribute(module: fx.GraphModule, inner: fx.GraphModule, name: str) -> str:
    """The name in the outer module of what an inner one has."""
    value = operator.attrgetter(name)(inner)
    stem = name.replace(".", "_")
    names = itertools.chain([stem], (f"{stem}_{number}" for number in itertools.count(1)))
    own = next(name for name in names if getattr(module, name, value) is value)
    setattr(module, own, value)
    return own


class _Renamed:
    """The stack of modules around an op of a region, as it would be in another call of it."""

    def __init__(self, first: Mapping[str, Any], this: Mapping[str, Any], name: str) -> None:
        self._first, self._this, self._name = first, this, name
        self._same = first is this

    def __call__(self, stack: Mapping[str, Any]) -> dict[str, Any]:
        if self._same or not self._first or list(stack)[: len(self._first)] != list(self._first):
            return dict(stack)
        before = list(self._first.values())[-1][0]
        after = list(self._this.values())[-1][0] if self._this else ""
        inside = list(stack.items())[len(self._first) :]
        found = dict(self._this)
        for key, (path, kind) in inside:
            found[f"{key}_{self._name}"] = path.replace(before, after, 1), kind
        return found
