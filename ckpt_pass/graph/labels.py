"""Names for the nodes of a joint graph that do not depend on how the graph was obtained.

A step that is captured ahead of time and the same step as a backend gets it have the same ops, but
other numbers, input orders and node names. A label says what a node does and where: the op, the
module call that it belongs to (in the backward: whose forward it differentiates), and how many of
its kind came before.
"""

from __future__ import annotations

from collections import Counter

from torch import fx

from ckpt_pass.graph.joint import JointGraph, is_multi_output_access
from ckpt_pass.ops.taxonomy import functional_twin, op_name
from ckpt_pass.policy.sites import CallNumbers, module_path


def node_labels(joint: JointGraph) -> dict[fx.Node, str]:
    """The label of each op of the graph; each label once."""
    counts: Counter[str] = Counter()
    numbers = CallNumbers()
    found: dict[fx.Node, str] = {}
    for node in joint.nodes:
        if node.op != "call_function" or not callable(node.target):
            continue
        if is_multi_output_access(node) and node.args[0] in found:
            label = f"{found[node.args[0]]}[{node.args[1]}]"  # type: ignore[index]
        else:
            forward = node in joint.forward_set
            stack = node.meta.get("nn_module_stack" if forward else "fwd_nn_module_stack")
            path = numbers.numbered(module_path(stack))
            fqn, call = path[-1] if path and forward else (path[-1][0] if path else "", 0)
            at = f"{fqn}@{call}" if call else fqn
            half = "" if forward else "backward "
            label = f"{half}{at}:{op_name(functional_twin(node.target))}"
        count = counts[label]
        counts[label] += 1
        found[node] = f"{label}#{count}" if count else label
    return found
