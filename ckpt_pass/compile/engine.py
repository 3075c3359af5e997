"""The pass over one joint graph: tag, choose what is saved, split, write down why."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import fx

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch import compilers, functorch
from ckpt_pass._torch.collector import quiet_collector
from ckpt_pass.compile.budgeting import Met, Opened, meet_budget, open_up
from ckpt_pass.compile.dedupe import merge_equal, merge_listed
from ckpt_pass.compile.moving import moves_of, sent_away
from ckpt_pass.compile.partition import (
    SavedSet,
    choose_saved,
    protect_mutated_inputs,
    split,
)
from ckpt_pass.compile.record import Decided, record_plan, solver_rule
from ckpt_pass.compile.replay import plan_of, replay, signature_of
from ckpt_pass.compile.shapes_read import read_shapes_alone
from ckpt_pass.compile.tagging import Tag, bind_offloads, tag
from ckpt_pass.graph.joint import JointGraph, read_joint
from ckpt_pass.graph.kernel_cache import KernelFacts
from ckpt_pass.graph.kernel_call import NOTHING
from ckpt_pass.graph.kernels import TIME, WORKSPACE, Kernels
from ckpt_pass.graph.labels import node_labels
from ckpt_pass.graph.link import device_of_graph, link_of
from ckpt_pass.graph.paper import kernels_for
from ckpt_pass.graph.problem import build_problem
from ckpt_pass.graph.real_looks import tell_real_sizes
from ckpt_pass.offloading.options import Offload
from ckpt_pass.offloading.stores import OffloadLike
from ckpt_pass.planner.solution import evaluate
from ckpt_pass.plans.budget import BudgetLike
from ckpt_pass.plans.goal import CostLike, Goal
from ckpt_pass.plans.parts import Replay
from ckpt_pass.plans.value import Plan
from ckpt_pass.policy.named import DEFAULT_POLICY, as_policy
from ckpt_pass.policy.opinion import Opinion
from ckpt_pass.policy.rules import Policy, PolicyLike, first_match, is_plain_data, recompute
from ckpt_pass.policy.sites import CallSite


class NotFunctionalError(CkptPassError):
    """The joint graph mutates an intermediate value, so nothing in it can be recomputed safely."""


#: With a budget and no policy named, every safe recomputation is open to the solver.
OPEN = first_match(recompute(), name="open to the solver")


def policy_for(policy: PolicyLike | None, budget: BudgetLike | None) -> Policy:
    """The policy that a user means: the one named, else the default one, or none at all.

    Raises:
        UnknownPolicyError: ``policy`` is none.
    """
    if policy is not None:
        return as_policy(policy)
    return as_policy(DEFAULT_POLICY) if budget is None else OPEN


def decide(
    joint: JointGraph,
    policy: Policy,
    goal: Goal | None = None,
    plans: Sequence[Plan] = (),
    part: bool = False,
    waiting_bytes: int = 0,
    offload: OffloadLike | None = None,
    cost: CostLike = "roofline",
    workspaces: bool = False,
) -> Decided:
    """Tag a joint graph and find what crosses from its forward to its backward.

    Args:
        joint: the graph; tags are written on it.
        policy: its MUST_* decisions bind; without a budget the others are carried out too.
        goal: the peak to stay within, and how.
        plans: decisions to carry out again, those of one of them; policy and goal are its own.
        part: whether it is one of several graphs of a step.
        waiting_bytes: what others hold between its forward and its backward.
        offload: where what is moved goes; ``None`` where nothing can be.
        cost: how times are found where there is no goal, which has its own.
        workspaces: whether what kernels allocate is measured where there is no goal, with which it
            always is.

    Raises:
        InfeasibleBudgetError, InvalidBudgetError, SymbolicBytesError: see
            :func:`ckpt_pass.compile.budgeting.meet_budget`.
        NotFunctionalError: the graph mutates an intermediate value.
        ContradictoryTagsError, PolicyReturnError: see :func:`ckpt_pass.compile.tagging.tag`.
        PlanMismatchError: the plans were made for other graphs.
    """
    culprit = functorch.non_functional_node(joint.module.graph)
    if culprit is not None:
        raise NotFunctionalError(
            f"Node {culprit.name} ({culprit.target}) mutates an intermediate value of the joint "
            "graph; expected a functional graph. Compile without disabling functionalisation."
        )
    with quiet_collector(collect_first=False):
        signature, labels = signature_of(joint), node_labels(joint)
        if plans:
            decided, script = _again(joint, plans, labels, offload)
        else:
            decided, merged = _anew(
                joint, policy, goal, part, waiting_bytes, offload, cost, workspaces
            )
            script = _script(decided, labels, merged)
    return replace(decided, signature=signature, script=script)


def _anew(
    joint: JointGraph,
    policy: Policy,
    goal: Goal | None,
    part: bool,
    waiting_bytes: int,
    offload: OffloadLike | None,
    cost: CostLike,
    workspaces: bool,
) -> tuple[Decided, list[tuple[fx.Node, fx.Node]]]:
    offloads = offload is not None
    tags, sites, merged, saved = _tagged(joint, policy, goal is None, offloads)
    if goal is None:
        facts = _measured(joint, cost, workspaces)
        return settled(joint, policy, tags, saved, sites, offload=offload, facts=facts), merged
    goal = _with_place(goal, tags, offload)
    met = meet_budget(joint, goal, part, waiting_bytes)
    for node, found in tags.items():
        decision = node.meta["recompute"]
        if decision is not found.opinion.decision:
            rule = solver_rule(met.solution)
            tags[node] = replace(found, opinion=Opinion(decision, rule))
    saved = _saved_as_tagged(joint)
    return settled(joint, policy, tags, saved, sites, met, goal, offload), merged


def _measured(joint: JointGraph, cost: CostLike, workspaces: bool) -> dict[fx.Node, KernelFacts]:
    """What a graph's kernels allocate, and the times that are no rates of the device here."""
    what = frozenset().union(WORKSPACE if workspaces else (), TIME if cost != "roofline" else ())
    calls = [node for node in joint.nodes if node.op == "call_function"]
    return kernels_for(cost).facts(calls, what) if what else {}


def _with_place(goal: Goal, tags: dict[fx.Node, Tag], offload: OffloadLike | None) -> Goal:
    """A goal with a place for what tags say to move; others may move there, too."""
    sends = goal.offload is None and any(found.opinion.offloads for found in tags.values())
    return replace(goal, offload=offload) if sends else goal


def _tagged(
    joint: JointGraph, policy: Policy, save_borders: bool, offloads: bool
) -> tuple[dict[fx.Node, Tag], frozenset[CallSite], list[tuple[fx.Node, fx.Node]], SavedSet]:
    """Tag a graph, and compute equal values once; what it saves as it is tagged."""
    tags = tag(joint, policy, offloads)
    if save_borders:  # no solver chooses
        bind_offloads(joint)
    sites = frozenset(found.context.site for found in tags.values())
    merged = merge_equal(joint, tags)
    saved = choose_saved(joint, save_borders=save_borders)
    if protect_mutated_inputs(joint, saved):
        saved = choose_saved(joint, save_borders=save_borders)
    return tags, sites, merged, saved


def opened(
    joint: JointGraph, policy: Policy, goal: Goal, offload: OffloadLike | None = None
) -> Opened:
    """A graph with the decisions of a policy that bind, ready to be solved for any budget.

    Raises:
        SymbolicBytesError, ContradictoryTagsError, PolicyReturnError: as :func:`decide`.
    """
    tags, *_ = _tagged(joint, policy, save_borders=False, offloads=offload is not None)
    return open_up(joint, _with_place(goal, tags, offload))


def _again(
    joint: JointGraph,
    plans: Sequence[Plan],
    labels: dict[fx.Node, str],
    offload: OffloadLike | None,
) -> tuple[Decided, Replay | None]:
    """Carry out the decisions of the plan that was made for a graph."""
    if any(plan.budget_bytes is not None for plan in plans):
        calls = [node for node in joint.nodes if node.op == "call_function"]
        tell_real_sizes(Kernels().facts(calls))  # bytes were written down as these are
    tags = tag(joint, OPEN)
    plan = plan_of(plans, joint, tags, labels)
    asked = plan.asked
    if plan.replay is not None:
        named = {label: node for node, label in labels.items()}
        pairs = [(named[one], named[other]) for one, other in plan.replay.merged]
        merge_listed(joint, tags, pairs)
    met = replay(joint, plan, tags, labels)
    opinions = {d.site: Opinion(d.decision, d.rule) for d in plan.decisions}
    for node, found in tags.items():
        tags[node] = replace(found, opinion=opinions.get(found.context.site, found.opinion))
    saved = _saved_as_tagged(joint)
    decided = settled(joint, asked.policy, tags, saved, plan.sites, met, asked.goal, offload)
    return decided, plan.replay


def _saved_as_tagged(joint: JointGraph) -> SavedSet:
    saved = choose_saved(joint, save_borders=False)
    # What a policy preferred to save, and the solver does not, may lead to more such inputs.
    if protect_mutated_inputs(joint, saved):
        saved = choose_saved(joint, save_borders=False)
    return saved


def _script(
    decided: Decided, labels: dict[fx.Node, str], merged: list[tuple[fx.Node, fx.Node]]
) -> Replay:
    """How to decide the same again; copies of inputs that are overwritten come by themselves."""
    nodes = decided.described.nodes
    drops = sorted((nodes[a], nodes[m]) for a, m in decided.solution.drops)
    moved = [node for node, _ in decided.moved]
    return Replay(
        tuple(labels[node] for node in decided.saved.values if node in labels),
        tuple((labels[a], labels[m]) for a, m in drops if a in labels and m in labels),
        tuple((labels[node], labels[other]) for node, other in merged),
        tuple(
            (labels[m.value], labels[m.released_after], labels[m.fetched_before], m.run)
            for m in moved
        ),
    )


def settled(
    joint: JointGraph,
    policy: Policy,
    tags: dict[fx.Node, Tag],
    saved: SavedSet,
    sites: frozenset[CallSite],
    met: Met | None = None,
    goal: Goal | None = None,
    offload: OffloadLike | None = None,
    facts: Mapping[fx.Node, KernelFacts] = NOTHING,
) -> Decided:
    """What was decided, with the numbers that the simulator finds for the graph as it is now."""
    described = build_problem(joint, met.facts if met else facts)
    number = described.index
    held = [number[node] for node in saved.values]
    link = met.link if met else None
    if met is None:
        found = evaluate(described.problem, held)
        if offload is not None and described.problem.must_move:
            link = link_of(offload, device_of_graph(joint))
            found = sent_away(described, found, offload, link)
    else:
        drops = {(number[anchor], number[maker]) for anchor, maker in met.drops}
        found = evaluate(described.problem, held, met.solution.solver, drops, (), met.link)
        if met.moved:
            moves = moves_of(described, found.steps, met.moved)
            found = evaluate(described.problem, held, found.solver, drops, moves, met.link)
        found = replace(
            found,
            status=met.solution.status,
            lower_bound_s=met.solution.lower_bound_s,
        )
    budget_bytes, plain = (met.budget_bytes, met.plain) if met else (None, None)
    return Decided(
        joint,
        policy,
        goal,
        sites,
        tags,
        saved,
        described,
        found,
        budget_bytes,
        plain,
        link,
        offload,
    )


class FreeOps:
    """The ops that inductor makes again in kernels that run anyway; torch is asked once a graph."""

    def __init__(self) -> None:
        self._known: dict[str, frozenset[str]] = {}

    def of(self, gm: fx.GraphModule, outputs: int, static: Sequence[int]) -> frozenset[str]:
        """The names of these forward ops.

        Args:
            gm: the joint graph.
            outputs: how many of its outputs are the forward's.
            static: the inputs that stay.
        """
        asked = f"{gm.graph} {outputs} {list(static)}"
        if asked not in self._known:
            copy = compilers.with_copied_graph(gm)
            self._known[asked] = functorch.recomputed_by_default(copy, outputs, static)
        return self._known[asked]


@dataclass(frozen=True)
class Partitioner(compilers.NamedPartitioner):
    """The partition function that AOTAutograd and inductor call.

    Attributes:
        policy: what to save.
        regions: FQN patterns of the layers; found from the module names where ``None``.
        input_names: what each placeholder of dynamo's graph is, in order.
        goal: the peak to stay within, if any.
        on_plan: told about each plan as it is made.
        plans: plans to carry out again, if any: that of the graph, or of each of several.
        in_place: whether what runs the backward takes ops that write over their inputs.
        part: whether the graph is one of several of a step.
        free: says which ops run again at no cost, where what runs the halves fuses them.
        artefacts: the name for inductor's caches; told from what was asked for if it is empty.
        offload: where what the policy offloads goes; ``None`` where the halves cannot move values.
        leaves: which placeholders of dynamo's graph are leaves that require gradients.
        waiting_bytes: what others hold between the graph's forward and its backward.
    """

    policy: Policy
    regions: tuple[str, ...] | None = None
    input_names: tuple[str, ...] = ()
    goal: Goal | None = None
    on_plan: Callable[[Plan], None] | None = None
    plans: tuple[Plan, ...] = ()
    in_place: bool = False
    part: bool = False
    free: FreeOps | None = None
    artefacts: str = ""
    offload: OffloadLike | None = None
    leaves: frozenset[int] = frozenset()
    waiting_bytes: int = 0

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Split ``gm`` into forward and backward; the signature is torch's.

        Of the keywords that torch passes, ``num_fwd_outputs`` and
        ``static_lifetime_input_indices`` matter here.
        """
        static = kwargs.get("static_lifetime_input_indices") or ()
        joint = self.joint(gm, kwargs["num_fwd_outputs"], static)
        decided = decide(
            joint,
            self.policy,
            self.goal,
            self.plans,
            self.part,
            self.waiting_bytes,
            self.offload,
        )
        if self.on_plan is not None:
            self.on_plan(record_plan(decided))
        return split(joint, decided.saved, decided.backward_order, decided.moved, decided.where)

    def joint(self, gm: fx.GraphModule, outputs: int, static: Sequence[int]) -> JointGraph:
        """The graph that is decided on; ``gm`` loses what nothing reads.

        Args:
            gm: the joint graph.
            outputs: how many of its outputs are the forward's.
            static: the inputs that stay.
        """
        gm.graph.eliminate_dead_code()
        if self.free is not None:
            read_shapes_alone(gm)
        joint = read_joint(gm, outputs, static, self.regions, self.input_names, self.leaves)
        joint.in_place = self.in_place
        if self.free is not None and self.goal is not None:
            joint.fused = self.free.of(gm, outputs, static)
        # Without a budget bytes are those of the graphs, whatever becomes of them.
        joint.inlines = self.free is not None and (self.goal is not None or self._replays_budget)
        return joint

    @property
    def _replays_budget(self) -> bool:
        return any(plan.budget_bytes is not None for plan in self.plans)

    def uuid(self) -> str | None:
        """The key for inductor's caches.

        ``None`` (no caching) for a policy that is mere code, for what a device has free now, and
        for a store of the user's.
        """
        if self.artefacts:
            return self.artefacts
        if not is_plain_data(self.policy) or (self.goal and not self.goal.is_plain_data):
            return None
        if not isinstance(self.offload, Offload | None):
            return None
        made = [plan.fingerprint for plan in self.plans]
        asked = f"{self.policy!r}/{self.regions!r}/{self.goal!r}/{self.part}/{self.waiting_bytes}"
        asked += f"/{self.offload!r}/{sorted(self.leaves)}"
        return f"ckpt_pass/{source_hash()}/{asked}/{made}"


@functools.cache
def source_hash() -> str:
    """A hash of this library's own source: another version is another cache entry."""
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
