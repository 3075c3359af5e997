"""Write down what was decided for a graph, as a plan."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ckpt_pass.compile.contents import contents, producer
from ckpt_pass.compile.moving import MovedNode, moved_nodes
from ckpt_pass.compile.partition import SavedSet, random_recomputed
from ckpt_pass.compile.symbolic import dimensions_of, symbolic_peak
from ckpt_pass.compile.tagging import Tag
from ckpt_pass.graph.cost import beside_bytes, held_bytes, own_bytes, random_state_bytes
from ckpt_pass.graph.joint import JointGraph
from ckpt_pass.graph.problem import GraphProblem
from ckpt_pass.offloading import graph_ops
from ckpt_pass.offloading.stores import OffloadLike
from ckpt_pass.ops.taxonomy import op_name
from ckpt_pass.planner.link import Link
from ckpt_pass.planner.solution import Solution
from ckpt_pass.plans.goal import Goal
from ckpt_pass.plans.link_use import LinkUse, MovedActivation
from ckpt_pass.plans.parts import Decision, Replay, SavedActivation, SavedActivations, Signature
from ckpt_pass.plans.record import Asked, CompiledExecution, Predicted, Proven
from ckpt_pass.plans.timeline import Timeline, timeline_of
from ckpt_pass.plans.value import Plan
from ckpt_pass.policy.rules import Policy, describe
from ckpt_pass.policy.sites import Bytes, CallSite, module_path, output_tensors
from ckpt_pass.version import __version__

RECOMPUTE = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)


@dataclass(frozen=True)
class Decided:
    """A joint graph with what was decided for it.

    Attributes:
        joint: the graph, tagged.
        policy: what tagged it.
        goal: what was asked for, if there is a budget.
        sites: the call sites of the graph, those of merged ops among them.
        tags: the decisions with their reasons.
        saved: what crosses from the forward to the backward.
        described: the graph as the planner sees it.
        solution: the same decisions as the simulator sees them.
        budget_bytes: the budget that they are for, if any.
        plain: memory of the same step with nothing recomputed, if there is a budget.
        link: what moves values, if anything may be moved.
        offload: where they go.
        signature: what the step takes.
        script: how to decide the same again.
    """

    joint: JointGraph
    policy: Policy
    goal: Goal | None
    sites: frozenset[CallSite]
    tags: dict[fx.Node, Tag]
    saved: SavedSet
    described: GraphProblem
    solution: Solution
    budget_bytes: int | None = None
    plain: Timeline | None = None
    link: Link | None = None
    offload: OffloadLike | None = None
    signature: Signature | None = None
    script: Replay | None = None

    @property
    def backward_order(self) -> list[fx.Node]:
        """The joint graph's nodes in the order in which the backward runs them."""
        return [node for _, node in self._backward]

    @cached_property
    def moved(self) -> list[tuple[MovedNode, int]]:
        """What leaves the device, and the place in that order before which it is asked for."""
        steps, moves = self.solution.steps, self.solution.moves
        places = [place for place, _ in self._backward]
        nodes = moved_nodes(self.described, steps, moves)
        return [
            (node, bisect_left(places, move.fetched_before))
            for node, move in zip(nodes, moves, strict=True)
        ]

    @property
    def _backward(self) -> Iterator[tuple[int, fx.Node]]:
        crosses = self.saved.symbols.keys() | self.saved.opaque.keys()  # had, not computed again
        for place, index in enumerate(self.solution.steps.backward):
            node = self.described.nodes[index]
            if node not in crosses:
                yield place, node

    @property
    def where(self) -> str:
        """The store that values go to, in words for the graph; empty where none does."""
        return "" if self.offload is None else graph_ops.words_of(self.offload)


def solver_rule(solution: Solution) -> str:
    """What made the decisions of a solver, in words; why it was chosen stands in the summary."""
    return f"solver ({solution.solver.partition(' (')[0]})"


def record_plan(decided: Decided) -> Plan:
    """Describe the decisions for one graph."""
    joint = decided.joint
    words = describe(decided.policy)
    outputs = [node for node in joint.forward_outputs if node not in joint.primals]
    asked = Asked(words, decided.policy, joint.regions_pattern, decided.goal, decided.budget_bytes)
    found = decided.solution
    budgeted = decided.budget_bytes is not None
    return Plan(
        fingerprint=fingerprint(joint, words, str(decided.goal), __version__),
        decisions=_decisions(decided),
        saved=SavedActivations(_saved_activations(decided, outputs)),
        regions=tuple(dict.fromkeys(r for r in joint.regions.values() if r is not None)),
        sites=decided.sites,
        asked=asked,
        predicted=_predicted(decided, outputs),
        proven=Proven(found.solver if budgeted else "", found.status, found.lower_bound_s),
        execution=_execution(decided),
    )


def _predicted(decided: Decided, outputs: list[fx.Node]) -> Predicted:
    found = decided.solution
    ran = found.profile.schedule
    ops = decided.described.problem.ops
    gradients = [node.meta.get("val") for node in dict.fromkeys(decided.joint.backward_outputs)]
    return Predicted(
        peak_bytes=found.peak_bytes,
        peak_at=_place(decided) if ran else "",
        output_bytes=held_bytes(outputs, decided.joint.primals),
        recompute_flops=found.recompute_flops,
        step_flops=sum(ops[i].flops for i in ran) - found.recompute_flops,
        recompute_time_s=float(found.recompute_time_s),
        step_time_s=float(sum(ops[i].time_s for i in ran) - found.recompute_time_s),
        timeline=timeline_of(decided.described.problem, found.profile, found.times),
        plain_timeline=decided.plain,
        measured_workspaces=sum(1 for i in ran if ops[i].workspace_bytes),
        offloaded=_offloaded(decided),
        beside_gradients_bytes=beside_bytes(output_tensors(gradients)),
        contents=contents(decided.joint, decided.described, found, decided.tags),
    )


def _offloaded(decided: Decided) -> LinkUse | None:
    times, link = decided.solution.times, decided.link
    if times is None or link is None:
        return None
    described, ops = decided.described, decided.described.problem.ops
    maker = described.problem.makers
    values = tuple(
        MovedActivation(
            name=_site_words(decided, described.nodes[maker[moved.storage]]),
            again_s=float(ops[maker[moved.storage]].time_s),
            transfer=moved,
        )
        for moved in times.transfers
    )
    return LinkUse(
        where=str(decided.offload).removeprefix("offload "),
        out_bytes_per_s=link.out_bytes_per_s,
        in_bytes_per_s=link.in_bytes_per_s,
        step_time_s=times.step_time_s,
        stall_s=times.stall_s,
        out_busy_s=times.out_busy_s,
        in_busy_s=times.in_busy_s,
        host_peak_bytes=times.host_peak_bytes,
        values=values,
    )


def _site_words(decided: Decided, node: fx.Node) -> str:
    found = decided.tags.get(producer(node))
    return str(found.context.site) if found is not None else node.name


def _execution(decided: Decided) -> CompiledExecution:
    assert decided.signature is not None and decided.script is not None
    dimensions = dimensions_of(decided.joint)
    return CompiledExecution(
        signature=decided.signature,
        replay=decided.script,
        peak_expression=symbolic_peak(decided.described, decided.solution, dimensions),
        dimensions=dimensions,
    )


def _place(decided: Decided) -> str:
    """Where the peak is, in words."""
    profile = decided.solution.profile
    node = decided.described.nodes[profile.schedule[profile.peak_index]]
    if node in decided.tags:
        run = "recomputation" if profile.peak_in_backward else "forward"
        return f"in the {run} of {decided.tags[node].context.site}"
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


def _decisions(decided: Decided) -> tuple[Decision, ...]:
    joint = decided.joint
    held = {producer(node): reason for node, reason in decided.saved.values.items()}
    away = {producer(move.value) for move, _ in decided.moved}
    runs = Counter(decided.solution.steps.backward)
    found = []
    for node, tag in decided.tags.items():
        times = runs[decided.described.index[node]]
        fate = "saved" if node in held else "recomputed" if times else "unused"
        fate = "offloaded" if node in away else fate
        found.append(
            Decision(
                site=tag.context.site,
                op_class=str(tag.context.op_class),
                nbytes=own_bytes(joint, node),
                decision=tag.opinion.decision,
                rule=held.get(node) or _rule(decided, tag, fate),
                fate=fate,
                times=times,
                time_s=decided.described.problem.ops[decided.described.index[node]].time_s,
                region=joint.regions.get(node),
            )
        )
    return tuple(found)


def _rule(decided: Decided, tag: Tag, fate: str) -> str:
    """The rule in words; of several outputs the solver saves one, whose op keeps its own tag."""
    of_solver = fate in ("saved", "offloaded") and decided.budget_bytes is not None
    if of_solver and tag.opinion.decision in RECOMPUTE:
        return solver_rule(decided.solution)
    return tag.opinion.rule


def _saved_activations(decided: Decided, outputs: list[fx.Node]) -> list[SavedActivation]:
    joint, tags, saved = decided.joint, decided.tags, decided.saved
    away = {move.value for move, _ in decided.moved}
    found = [_saved_input(joint, node) for node in saved.inputs]
    returned = {joint.owner(node) for node in outputs}
    counted: list[fx.Node] = list(joint.primals)
    for node, reason in saved.values.items():
        maker = producer(node)
        tag = tags.get(maker)
        site = tag.context.site if tag else None
        nbytes = held_bytes([node], counted)
        counted.append(node)
        found.append(
            SavedActivation(
                kind=_kind(node, returned, away),
                site=site,
                shape=tuple(node.meta["val"].shape),
                dtype=str(node.meta["val"].dtype).removeprefix("torch."),
                nbytes=nbytes,
                provenance=_provenance(node, maker, site),
                reason=reason or (tag.opinion.rule if tag else ""),
            )
        )
    return found + [_saved_random_state(node, tags) for node in random_recomputed(saved)]


def _kind(node: fx.Node, returned: set[fx.Node], away: set[fx.Node]) -> str:
    if node in returned:
        return "output"
    return "offloaded" if node in away else "activation"


def _provenance(node: fx.Node, maker: fx.Node, site: object) -> str:
    if site is None:
        return f"copy of {maker.args[0]} before it is overwritten"
    which = f"output {node.args[1]} of " if node is not maker else "output of "
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
    nbytes: Bytes = random_state_bytes(node)
    return SavedActivation(
        kind="random state",
        site=tags[node].context.site,
        shape=(nbytes,),
        dtype="uint8",
        nbytes=nbytes,
        provenance=f"random state before {tags[node].context.site}",
        reason="recomputed with the numbers of its forward",
    )
