"""Ask a policy about a call site: the decision, and in words which of its rules made it.

The drivers (the tagging of a joint graph, the dispatch modes of a checkpoint region) ask here, so
that they check, name and default alike what a policy answers.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch.utils.checkpoint import CheckpointPolicy

from ckpt_pass.offloading.sharding import Sharding
from ckpt_pass.ops.taxonomy import OpClass, classify, op_name
from ckpt_pass.policy.rules import (
    DEFAULT,
    OFFLOADING,
    SAVING,
    FirstMatch,
    Policy,
    Rule,
    Ruling,
    check_decision,
    describe,
)
from ckpt_pass.policy.sites import SiteContext


class UnclassifiedOpWarning(UserWarning):
    """An op that the taxonomy does not know was met; it is taken for an expensive one."""


def report_unclassified(op: Any) -> None:
    """Warn about an op of no known class; Python shows the same warning once."""
    if classify(op) is OpClass.UNCLASSIFIED:
        warnings.warn(
            f"{op_name(op)} is in no class of the op taxonomy, so policies take it for an "
            "expensive op. Tag it (torch.library.custom_op(..., tags=...), say with "
            "torch.Tag.pointwise), or name it in a rule: save(op=...) or recompute(op=...).",
            UnclassifiedOpWarning,
            stacklevel=2,
        )


@dataclass(frozen=True, slots=True)
class Opinion:
    """A decision and, in words, the rule that made it.

    Attributes:
        sharding: over which ranks the value is sharded, where it is; its decision is to save it.
    """

    decision: CheckpointPolicy
    rule: str
    sharding: Sharding | None = None

    @classmethod
    def of(cls, ruling: Ruling, rule: str) -> Opinion:
        """What a rule has said."""
        if isinstance(ruling, Sharding):
            return cls(CheckpointPolicy.MUST_SAVE, rule, ruling)
        return cls(ruling, rule)

    @property
    def saves(self) -> bool:
        return self.decision in SAVING

    @property
    def offloads(self) -> bool:
        return self.decision in OFFLOADING


def opinion(
    policy: Policy, site: SiteContext, offloads: bool = False, shards: bool = False
) -> Opinion:
    """Ask ``policy`` about ``site``: the decision, and which of its rules made it.

    Args:
        policy: the policy.
        site: the call site.
        offloads: whether values can be offloaded there.
        shards: whether they can be kept in parts there.

    Raises:
        PolicyReturnError: it returned something that is not a decision, or cannot be carried out.
        CompiledShardError: it shards where that cannot be carried out.
    """
    if isinstance(policy, FirstMatch):
        for part in policy.policies:
            found = _ask(part, site, offloads, shards)
            if found is not None:
                return found
        return Opinion(DEFAULT, "default (no rule matched)")
    return _ask(policy, site, offloads, shards) or Opinion(DEFAULT, "default (no opinion)")


def _ask(policy: Policy, site: SiteContext, offloads: bool, shards: bool) -> Opinion | None:
    if isinstance(policy, FirstMatch):
        for part in policy.policies:
            found = _ask(part, site, offloads, shards)
            if found is not None:
                return found
        return None
    decision = policy(site)
    if decision is None:
        return None
    name = describe(policy)
    return Opinion.of(check_decision(decision, name, site.site, offloads, shards), name)


@runtime_checkable
class OpList(Protocol):
    """A policy that has opinions on some ops only, and tells which."""

    def lists(self, op: Any) -> bool:
        """Whether any execution of ``op`` may be saved, or offloaded."""
        ...


def settled(policy: Policy, site: SiteContext) -> Opinion | None:
    """The opinion that the op of ``site`` gets wherever it runs; ``None`` if that depends.

    Where a rule counts matches, every execution has to be counted, and nothing is settled.
    """
    if isinstance(policy, OpList):
        return None if policy.lists(site.op) else Opinion(DEFAULT, "not listed")
    parts = policy.policies if isinstance(policy, FirstMatch) else (policy,)
    rules = [part for part in parts if isinstance(part, Rule)]
    if len(rules) < len(parts) or any(rule.nth or rule.every for rule in rules):
        return None
    for part in rules:
        if part.matches_op(site):
            return opinion(part, site, offloads=True, shards=True) if part.by_op_alone else None
    return Opinion(DEFAULT, "default (no rule matched)")
