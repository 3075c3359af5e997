"""Write down what was decided for a graph, as a plan."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import fx

from ckpt_pass import _torch
from ckpt_pass.compile.partition import SavedSet, random_recomputed
from ckpt_pass.compile.tagging import Tag
from ckpt_pass.graph.cost import held_bytes, own_bytes
from ckpt_pass.graph.joint import JointGraph, is_multi_output_access
from ckpt_pass.graph.problem import SymbolicBytesError, build_problem
from ckpt_pass.ops import op_name
from ckpt_pass.plan import Decision, Plan, SavedActivation, SavedActivations
from ckpt_pass.planner.solve import Solution, evaluate
from ckpt_pass.policy import Policy, describe
from ckpt_pass.sites import Bytes, module_path


def record_plan(
    joint: JointGraph,
    policy: Policy,
    tags: dict[fx.Node, Tag],
    saved: SavedSet,
    budget_bytes: int | None = None,
    solver: str = "",
) -> Plan:
    """Describe the decisions for one graph."""
    outputs = [node for node in joint.forward_outputs if node not in joint.primals]
    cost = _cost(joint, tags, saved)
    return Plan(
        policy=describe(policy),
        fingerprint=fingerprint(joint, describe(policy)),
        decisions=_decisions(joint, tags, saved),
        saved=SavedActivations(_saved_activations(joint, tags, saved, outputs)),
        output_bytes=held_bytes(outputs, joint.primals),
        peak_bytes=cost.peak_bytes,
        peak_at=cost.peak_at,
        recompute_flops=cost.recompute_flops,
        step_flops=cost.step_flops,
        recompute_time_s=cost.recompute_time_s,
        step_time_s=cost.step_time_s,
        budget_bytes=budget_bytes,
        solver=solver,
        regions=tuple(dict.fromkeys(r for r in joint.regions.values() if r is not None)),
    )


@dataclass(frozen=True)
class _Cost:
    """What the simulator and the cost model say of a plan."""

    peak_bytes: int | None = None
    peak_at: str = ""
    recompute_flops: int = 0
    step_flops: int = 0
    recompute_time_s: float = 0.0
    step_time_s: float = 0.0


def _cost(joint: JointGraph, tags: dict[fx.Node, Tag], saved: SavedSet) -> _Cost:
    try:
        problem, index = build_problem(joint)
    except SymbolicBytesError:
        return _Cost()
    found = evaluate(problem, [index[node] for node in saved.values])
    schedule = found.profile.schedule
    node_of = {number: node for node, number in index.items()}
    where = _place(found, node_of[schedule[found.profile.peak_index]], tags) if schedule else ""
    return _Cost(
        peak_bytes=found.peak_bytes,
        peak_at=where,
        recompute_flops=found.recompute_flops,
        step_flops=sum(problem.ops[i].flops for i in schedule) - found.recompute_flops,
        recompute_time_s=found.recompute_time_s,
        step_time_s=sum(problem.ops[i].time_s for i in schedule) - found.recompute_time_s,
    )


def _place(found: Solution, node: fx.Node, tags: dict[fx.Node, Tag]) -> str:
    """Where the peak is, in words."""
    if node in tags:
        run = "recomputation" if found.profile.peak_in_backward else "forward"
        return f"in the {run} of {tags[node].context.site}"
    return f"in the backward{_of_module(node)}"


def _of_module(node: fx.Node) -> str:
    """An op of the backward, and the module whose forward it differentiates."""
    stack = node.meta.get("fwd_nn_module_stack") or node.meta.get("nn_module_stack")
    path = module_path(stack)
    target = op_name(node.target) if callable(node.target) else str(node.target)
    return f" of {path[-1][0]} ({target})" if path else f" ({target})"


def fingerprint(joint: JointGraph, *extra: str) -> str:
    """A hash of the graph's ops, edges, shapes and dtypes, and of ``extra``; the same every run."""
    number = {node: index for index, node in enumerate(joint.nodes)}
    digest = hashlib.sha256("\0".join(extra).encode())
    for node in joint.nodes:
        args = fx.map_arg((node.args, node.kwargs), lambda n: f"%{number[n]}")
        value = node.meta.get("val")
        shape = f"{value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else ""
        target = op_name(node.target) if node.op == "call_function" else node.op
        digest.update(f"{target}{args}{shape}\n".encode())
    return digest.hexdigest()


def _producer(node: fx.Node) -> fx.Node:
    """The op execution that a value belongs to: itself, or the multi-output op."""
    while is_multi_output_access(node):
        assert isinstance(node.args[0], fx.Node)
        node = node.args[0]
    return node


def _decisions(
    joint: JointGraph, tags: dict[fx.Node, Tag], saved: SavedSet
) -> tuple[Decision, ...]:
    held = {_producer(node): reason for node, reason in saved.values.items()}
    again = {_producer(node) for node in saved.recomputed}
    found = []
    for node, tag in tags.items():
        fate = "saved" if node in held else "recomputed" if node in again else "unused"
        found.append(
            Decision(
                site=tag.context.site,
                op_class=str(tag.context.op_class),
                nbytes=own_bytes(joint, node),
                decision=tag.opinion.decision,
                rule=held.get(node) or tag.opinion.rule,
                fate=fate,
                region=joint.regions.get(node),
            )
        )
    return tuple(found)


def _saved_activations(
    joint: JointGraph, tags: dict[fx.Node, Tag], saved: SavedSet, outputs: list[fx.Node]
) -> list[SavedActivation]:
    found = [_saved_input(joint, node) for node in saved.inputs]
    returned = {joint.owner(node) for node in outputs}
    counted: list[fx.Node] = list(joint.primals)
    for node, reason in saved.values.items():
        producer = _producer(node)
        tag = tags.get(producer)
        site = tag.context.site if tag else None
        nbytes = held_bytes([node], counted)
        counted.append(node)
        found.append(
            SavedActivation(
                kind="output" if node in returned else "activation",
                site=site,
                shape=tuple(node.meta["val"].shape),
                dtype=str(node.meta["val"].dtype).removeprefix("torch."),
                nbytes=nbytes,
                provenance=_provenance(node, producer, site),
                reason=reason or (tag.opinion.rule if tag else ""),
            )
        )
    return found + [_saved_random_state(node, tags) for node in random_recomputed(saved)]


def _provenance(node: fx.Node, producer: fx.Node, site: object) -> str:
    if site is None:
        return f"copy of {producer.args[0]} before it is overwritten"
    which = f"output {node.args[1]} of " if node is not producer else "output of "
    return f"{which}{site}"


def _saved_input(joint: JointGraph, node: fx.Node) -> SavedActivation:
    value = node.meta["val"]
    return SavedActivation(
        kind="parameter" if node in joint.static_inputs else "input",
        site=None,
        shape=tuple(value.shape),
        dtype=str(value.dtype).removeprefix("torch."),
        nbytes=0,
        provenance=joint.input_names.get(node.name, node.name),
        reason="",
    )


def _saved_random_state(node: fx.Node, tags: dict[fx.Node, Tag]) -> SavedActivation:
    nbytes: Bytes = _torch.random_state_bytes(node)
    return SavedActivation(
        kind="random state",
        site=tags[node].context.site,
        shape=(nbytes,),
        dtype="uint8",
        nbytes=nbytes,
        provenance=f"random state before {tags[node].context.site}",
        reason="recomputed with the numbers of its forward",
    )
