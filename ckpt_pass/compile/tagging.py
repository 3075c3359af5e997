"""Tag the forward of a joint graph, node by node, and check that the tags can be carried out.

The tag is torch's own: ``node.meta["recompute"]``, a ``CheckpointPolicy``. Tags that were there
before us are the user's (``torch.utils.checkpoint`` inside the compiled code): they bind.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch import functorch
from ckpt_pass.graph.joint import JointGraph, is_multi_output_access
from ckpt_pass.ops.taxonomy import OpClass, classify, never_recompute
from ckpt_pass.policy.opinion import Opinion, opinion, report_unclassified
from ckpt_pass.policy.rules import OFFLOADING, SAVING, Policy, check_decision
from ckpt_pass.policy.sites import SiteContext

#: Inductor draws the seeds of a whole graph at once (``replace_random_passes``); the ops that use
#: them are pure, so that saving a few bytes of seeds makes every recomputation draw alike.
SEEDS = "prims.inductor_seed"

COPIED_INPUT = "a copy of an input, which may change before the backward"
_KEEPING = SAVING | OFFLOADING
USER_TAG = "tag set before this pass (torch.utils.checkpoint in the compiled code)"


class ContradictoryTagsError(CkptPassError):
    """Two tags that cannot both be carried out."""


@dataclass(frozen=True, slots=True)
class Tag:
    """What was decided for one op execution, and where it is."""

    context: SiteContext
    opinion: Opinion

    @property
    def saves(self) -> bool:
        return self.opinion.saves or self.opinion.offloads


def tag(joint: JointGraph, policy: Policy, offloads: bool = False) -> dict[fx.Node, Tag]:
    """Write ``meta["recompute"]`` on every forward op and return the tags with their reasons.

    Outputs of multi-output ops and waits of collectives follow their producer.

    Args:
        joint: the graph.
        policy: what to ask where nothing is tagged.
        offloads: whether what runs the graph can move values.

    Raises:
        ContradictoryTagsError: an op must be recomputed but never can be, or an output is tagged
            other than the op it comes from.
        PolicyReturnError: the policy returned something that is not a decision.
    """
    functorch.force_save_effects(joint.module)
    tags: dict[fx.Node, Tag] = {}
    for node, context in joint.sites():
        tags[node] = Tag(context, _decide(joint, node, context, policy, offloads))
        report_unclassified(node.target)
    for node, found in tags.items():
        producer = _waited_on(node)
        if producer in tags and found.opinion.rule != USER_TAG:
            tags[node] = replace(found, opinion=tags[producer].opinion)
        node.meta["recompute"] = tags[node].opinion.decision
    _tag_outputs(joint)
    return tags


def bind_offloads(joint: JointGraph) -> None:
    """Have moved what tags prefer to move."""
    for node in joint.forward:
        if node.meta.get("recompute") is CheckpointPolicy.PREFER_CPU_OFFLOAD:
            node.meta["recompute"] = CheckpointPolicy.MUST_CPU_OFFLOAD


def _decide(
    joint: JointGraph, node: fx.Node, context: SiteContext, policy: Policy, offloads: bool
) -> Opinion:
    if context.site.op.startswith(SEEDS):
        return Opinion(CheckpointPolicy.MUST_SAVE, "seeds of random ops")
    users = node.meta.get("recompute")
    if users is not None:
        found = Opinion.of(check_decision(users, USER_TAG, context.site, offloads), USER_TAG)
    else:
        found = opinion(policy, context, offloads)
    undecided = users is None and found.decision is CheckpointPolicy.PREFER_RECOMPUTE
    if undecided and _is_copied_input(joint, node):
        return Opinion(CheckpointPolicy.MUST_SAVE, COPIED_INPUT)
    if not may_not_repeat(node):
        return found
    if found.decision is CheckpointPolicy.MUST_RECOMPUTE:
        raise ContradictoryTagsError(
            f"Node {node.name} ({context.site}) is tagged MUST_RECOMPUTE by {found.rule}, but "
            f"{context.site.op} ({context.op_class}) is never recomputed: it has an effect or its "
            "output shape depends on data. Give it MUST_SAVE, or no opinion."
        )
    if found.saves or found.offloads:
        return found
    return Opinion(CheckpointPolicy.MUST_SAVE, f"never recomputed ({context.op_class})")


def _is_copied_input(joint: JointGraph, node: fx.Node) -> bool:
    """Whether a call is ``.clone()`` of an input, or of a view of one, that takes no gradient.

    It was asked for since the input changes before the backward, as a queue of keys does (MoCo):
    eager mode keeps the copy. ``contiguous()`` is a clone with a memory format.
    """
    if node.target is not torch.ops.aten.clone.default or "memory_format" in node.kwargs:
        return False
    source = node.args[0]
    owner = joint.owner(source) if isinstance(source, fx.Node) else None
    if owner is None or not functorch.is_primal(owner):
        return False
    value = owner.meta.get("val")
    return isinstance(value, torch.Tensor) and not value.requires_grad


def may_not_repeat(node: fx.Node) -> bool:
    """Whether running this call a second time would be wrong."""
    return callable(node.target) and never_recompute(node.target, node.args, node.kwargs)


def _waited_on(node: fx.Node) -> fx.Node | None:
    """The collective that a wait belongs to."""
    if "wait" not in str(node.target) or classify(node.target) is not OpClass.COLLECTIVE:
        return None
    first = node.args[0] if node.args else None
    return first if isinstance(first, fx.Node) else None


def _tag_outputs(joint: JointGraph) -> None:
    for node in joint.forward:
        if not is_multi_output_access(node):
            continue
        producer = node.args[0]
        assert isinstance(producer, fx.Node)
        wanted, own = producer.meta.get("recompute"), node.meta.get("recompute")
        if wanted is None:
            continue
        if own is not None and (own in _KEEPING) != (wanted in _KEEPING):
            if own in _KEEPING and may_not_repeat(producer):
                continue  # results of effects: torch tags the outputs and not the op
            raise ContradictoryTagsError(
                f"Node {node.name} is tagged {own.name}, but it is output {node.args[1]} of "
                f"{producer.name}, tagged {wanted.name}. An output is saved or recomputed with "
                f"its op: give {producer.name} and all its outputs the same tag."
            )
        node.meta["recompute"] = wanted
