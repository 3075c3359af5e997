"""What is in memory at each moment of a compiled step that was planned."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from ckpt_pass.compile.tagging import Tag
from ckpt_pass.graph.joint import JointGraph, is_multi_output_access
from ckpt_pass.graph.problem import GraphProblem
from ckpt_pass.ops.taxonomy import op_name
from ckpt_pass.planner.alive import alive_in
from ckpt_pass.planner.solution import Solution
from ckpt_pass.plans.contents import Contents, OpName, contents_of, layer_of
from ckpt_pass.policy.sites import module_path


def contents(
    joint: JointGraph,
    described: GraphProblem,
    solution: Solution,
    tags: Mapping[fx.Node, Tag],
) -> Contents:
    """What is in memory when.

    Args:
        joint: the graph.
        described: the graph as the planner sees it.
        solution: what was decided.
        tags: the call sites of its forward.
    """
    ops = len(described.problem.ops)
    names = [_name(joint, node, tags) for node in described.nodes]
    names += [OpName("", "other graphs")] * (ops - len(names))
    profile = solution.profile
    found = alive_in(described.problem, solution.steps, solution.moves)
    return contents_of(names, profile.schedule, found, profile.bytes_at)


def producer(node: fx.Node) -> fx.Node:
    """The op execution that a value belongs to: itself, or the multi-output op."""
    while is_multi_output_access(node):
        assert isinstance(node.args[0], fx.Node)
        node = node.args[0]
    return node


def _name(joint: JointGraph, node: fx.Node, tags: Mapping[fx.Node, Tag]) -> OpName:
    maker = producer(node)
    found = tags.get(maker)
    if found is not None:
        site = found.context.site
        return OpName(layer_of(joint.regions.get(maker), site.fqn), str(site))
    stack = maker.meta.get("fwd_nn_module_stack") or maker.meta.get("nn_module_stack")
    path = module_path(stack)
    target = op_name(maker.target) if callable(maker.target) else str(maker.target)
    if not path:
        return OpName("", target)
    fqn = path[-1][0]
    return OpName(layer_of(joint.region_of_backward(maker), fqn), f"{fqn} {target}")
