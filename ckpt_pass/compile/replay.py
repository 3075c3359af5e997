"""Carry out a plan on a joint graph: the decisions as they were made, nothing solved again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ckpt_pass._torch import functorch
from ckpt_pass.compile.budgeting import Met
from ckpt_pass.compile.moving import MovedNode, moves_of
from ckpt_pass.compile.symbolic import BudgetExceededWarning
from ckpt_pass.compile.tagging import Tag
from ckpt_pass.graph.cost import node_flops, own_bytes
from ckpt_pass.graph.device_rates import with_device_times
from ckpt_pass.graph.joint import JointGraph
from ckpt_pass.graph.kernels import WORKSPACE, WORKSPACE_AND_TIME
from ckpt_pass.graph.paper import kernels_for
from ckpt_pass.graph.problem import build_problem
from ckpt_pass.graph.real_looks import tell_real_sizes
from ckpt_pass.offloading.options import Offload
from ckpt_pass.planner.link import Link
from ckpt_pass.planner.solution import evaluate, without_recompute
from ckpt_pass.plans.parts import Decision, Replay, Signature
from ckpt_pass.plans.signature import (
    PlanMismatchError,
    looks,
    looks_at,
    looks_now,
    signature,
    signature_differences,
)
from ckpt_pass.plans.timeline import timeline_of
from ckpt_pass.plans.value import Plan
from ckpt_pass.plans.wording import format_bytes
from ckpt_pass.policy.sites import CallSite

#: Ops that compute sizes, which a graph has where dynamo leaves them open.
_OF_SIZES = ("operator.", "aten.sym_")


def signature_of(joint: JointGraph) -> Signature:
    """What goes into a joint graph: the looks of its arguments, and of its parameters."""
    return _signature(joint, looks)


def _signature(joint: JointGraph, look: Callable[[torch.Tensor], str]) -> Signature:
    static = set(joint.static_inputs)
    values = [(node, node.meta.get("val")) for node in joint.primals]
    tensors = [(node, value) for node, value in values if isinstance(value, torch.Tensor)]
    return signature(
        (look(value) for node, value in tensors if node not in static),
        (look(value) for node, value in tensors if node in static),
    )


def plan_of(
    plans: Sequence[Plan],
    joint: JointGraph,
    tags: Mapping[fx.Node, Tag],
    labels: Mapping[fx.Node, str],
) -> Plan:
    """The one of several plans that was made for this very graph.

    Raises:
        PlanMismatchError: none was; it says what differs from the one that is nearest.
    """
    sites = {found.context.site for found in tags.values()}
    # The most similar first. Forwards that are alike differ in their backward: an input needs no
    # gradient. A step's flops tell; what is computed once in it makes them a little less.
    flops = sum(node_flops(n) for n in joint.nodes if n.op == "call_function") if plans[1:] else 0

    def unlike(plan: Plan) -> tuple[int, int]:
        return len(plan.sites ^ sites), abs(plan.predicted.step_flops - flops)

    ordered = sorted(plans, key=unlike)
    differences = []
    for plan in ordered:
        reasons = _differences(plan, joint, tags, labels)
        if not reasons:
            return plan
        differences.append(reasons)
    number, open_sizes = plans.index(ordered[0]), _of_open(joint, plans)
    which = "The plan" if len(plans) == 1 else f"The nearest of {len(plans)} plans ({number})"
    raise PlanMismatchError(
        f"{which} was made for another graph: {'; '.join(differences[0])}. Expected its "
        f"{len(ordered[0].sites)} call sites and no others, with the same shapes.{open_sizes} Make "
        "the plan for this very model, arguments and loss, and with the inner= that it is carried "
        "out with (inductor takes ops apart before it asks for a plan: plan(..., "
        "inner='inductor')), or give the backend the budget instead."
    )


def _of_open(joint: JointGraph, plans: Sequence[Plan]) -> str:
    """What to do about sizes that dynamo has left open, where it has."""
    values = (node.meta.get("val") for node in joint.primals)
    sizes = (size for v in values if isinstance(v, torch.Tensor) for size in v.shape)
    if all(isinstance(size, int) for size in sizes):
        return ""
    return (
        " Dynamo has left sizes open here, and compiles once for all of them: with"
        " torch.compile(..., dynamic=False) each size has a graph, and takes a plan and a backend"
        " of its own; "
        + (
            "steps of several graphs have none for all sizes."
            if plans[1:]
            else "plan(..., dynamic=True) is for all sizes."
        )
    )


def _differences(
    plan: Plan, joint: JointGraph, tags: Mapping[fx.Node, Tag], labels: Mapping[fx.Node, str]
) -> list[str]:
    """What tells a graph from the one that a plan was made for; empty where nothing matters.

    Call sites, arguments, bytes, or values of the backward; parameters that look otherwise are
    told beside these.
    """
    found = {found.context.site: node for node, found in tags.items()}
    missing = {site for site in plan.sites - found.keys() if not site.op.startswith(_OF_SIZES)}
    new = {site for site in found.keys() - plan.sites if not functorch.is_sym_node(found[site])}
    reasons = _inputs_differ(plan, joint)
    if missing or new:
        lacks = f"lacks {len(missing)} of its call sites (first: {min(missing)})" if missing else ""
        has = f"has {len(new)} others (first: {min(new)})" if new else ""
        reasons.insert(0, "this one " + " and ".join(filter(None, (lacks, has))))
    else:
        reasons += _bytes_differ(plan.decisions, found, joint)
    unknown = _unknown(plan.replay, set(labels.values())) if plan.replay is not None else set()
    if unknown:
        reasons.append(f"this one lacks {len(unknown)} values of the plan (first: {min(unknown)})")
    speaking = any("argument" in reason or "bytes" in reason for reason in reasons)
    matters = bool(missing or new or unknown or speaking)
    return reasons if matters else []


def _inputs_differ(plan: Plan, joint: JointGraph) -> list[str]:
    """What the arguments and parameters differ in.

    Dynamo leaves sizes open that it has seen change, in other steps, too: what was planned with the
    sizes that this step has is for the same step.
    """
    planned, here = plan.signature, signature_of(joint)
    found = [] if planned is None else signature_differences(planned, here)
    if not found or planned is None:
        return found
    traced = {dimension.symbol: dimension.traced for dimension in plan.dimensions}
    arguments = [looks_at(look, traced) for look in planned.arguments]
    parameters = [looks_at(look, traced) for look in planned.parameters]
    closed = replace(
        planned, arguments=tuple(sorted(arguments)), parameters=tuple(sorted(parameters))
    )
    return signature_differences(closed, _signature(joint, looks_now))


def _unknown(script: Replay, known: set[str]) -> set[str]:
    """What a script speaks of and the graph lacks; what it merges away is not there afterwards."""
    used = {*script.saved, *(label for pair in script.drops for label in pair)}
    used |= {label for move in script.moves for label in move[:3]}
    gone = {label for label, _ in script.merged}
    return (used - (known - gone)) | {label for pair in script.merged for label in pair} - known


def _bytes_differ(
    decisions: tuple[Decision, ...], found: Mapping[CallSite, fx.Node], joint: JointGraph
) -> list[str]:
    for decision in decisions:
        node = found.get(decision.site)
        # Merging equal values moves memory between views, never between ops that compute.
        is_view = decision.op_class in ("view", "metadata")
        if node is None or is_view or not isinstance(decision.nbytes, int):
            continue
        nbytes = own_bytes(joint, node)
        if isinstance(nbytes, int) and nbytes != decision.nbytes:
            return [f"{decision.site} makes {nbytes} bytes here, {decision.nbytes} in the plan"]
    return []


def replay(
    joint: JointGraph,
    plan: Plan,
    tags: dict[fx.Node, Tag],
    labels: Mapping[fx.Node, str],
) -> Met:
    """Tag a graph as a plan says; return what the planner would have.

    Args:
        joint: the graph; equal values are merged already.
        plan: what to carry out.
        tags: the call sites; the tags on the graph are overwritten.
        labels: the graph's node labels.
    """
    goal = plan.asked.goal
    kernels = kernels_for("roofline" if goal is None else goal.cost)
    what = WORKSPACE_AND_TIME if goal is not None and goal.cost == "measured" else WORKSPACE
    nodes = [node for node in joint.nodes if node.op == "call_function"]
    facts = kernels.facts(nodes, what) if plan.budget_bytes is not None else {}
    tell_real_sizes(facts)
    if goal is not None and goal.offload is not None:
        facts = with_device_times(facts, nodes, kernels)
    described = build_problem(joint, facts)
    named = {label: node for node, label in labels.items()}
    script = plan.replay if plan.replay is not None else _script(plan, tags, labels)
    saved = [named[label] for label in script.saved]
    drops = frozenset((named[anchor], named[maker]) for anchor, maker in script.drops)
    for node in joint.forward:
        kept = CheckpointPolicy.MUST_SAVE if node in saved else CheckpointPolicy.PREFER_RECOMPUTE
        node.meta["recompute"] = kept
    index = described.index
    pairs = [(index[anchor], index[maker]) for anchor, maker in drops]
    words = plan.proven.solver or "replayed"
    moved = tuple(MovedNode(named[v], named[r], named[f], run) for v, r, f, run in script.moves)
    held = [index[node] for node in saved]
    link = link_of(plan)
    solution = evaluate(described.problem, held, words, pairs)
    if moved:
        moves = moves_of(described, solution.steps, moved)
        solution = evaluate(described.problem, held, words, pairs, moves, link)
    if plan.inner != "inductor":
        warn_if_over(plan.budget_bytes, solution.peak_bytes)
    plain = without_recompute(described.written)
    timeline = timeline_of(described.written, plain.profile)
    return Met(solution, drops, plan.budget_bytes, facts, timeline, moved, link)


def link_of(plan: Plan) -> Link | None:
    """The link that a plan was made for, if any; its rates are not measured again."""
    found, goal = plan.predicted.offloaded, plan.asked.goal
    if found is None:
        return None
    options = goal.offload if goal is not None else None
    limit = options.host_budget_bytes if isinstance(options, Offload) else None
    return Link(found.out_bytes_per_s, found.in_bytes_per_s, host_bytes=limit)


def warn_if_over(budget_bytes: int | None, peak_bytes: int) -> None:
    """Say so where a plan that is carried out again peaks above its budget."""
    if budget_bytes is None or peak_bytes <= budget_bytes:
        return
    warnings.warn(
        f"Carried out here, the plan's step peaks at {peak_bytes:,} bytes "
        f"({format_bytes(peak_bytes)}), above its budget of {budget_bytes:,} bytes "
        f"({format_bytes(budget_bytes)}): its ops are those of the plan, but the machine's "
        "kernels, the backward's order or torch.compile's mode are others (a plan is of the "
        "default mode). Make the plan here, or give the backend the budget instead.",
        BudgetExceededWarning,
        stacklevel=2,
    )


def _script(plan: Plan, tags: dict[fx.Node, Tag], labels: Mapping[fx.Node, str]) -> Replay:
    """The saved values by call site, of a plan that was not made for a joint graph."""
    kept = plan.saved_sites
    saved = [labels[node] for node, found in tags.items() if found.context.site in kept]
    return Replay(tuple(saved), (), ())
