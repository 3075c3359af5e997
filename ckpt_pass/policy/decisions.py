"""What a policy can answer, and whether that is carried out where it is asked."""

from __future__ import annotations

from typing import Any, TypeAlias

from torch.utils.checkpoint import CheckpointPolicy

from ckpt_pass._errors import CkptPassError
from ckpt_pass.offloading.sharding import Sharding

#: The decision for an op on which no rule has an opinion, as in torch's selective checkpointing.
DEFAULT = CheckpointPolicy.PREFER_RECOMPUTE

SAVING = frozenset({CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE})
RECOMPUTING = frozenset({CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE})
#: Torch itself acts on neither (2.11 to 2.13): its eager contexts recompute such an op.
OFFLOADING = frozenset({CheckpointPolicy.MUST_CPU_OFFLOAD, CheckpointPolicy.PREFER_CPU_OFFLOAD})
#: What becomes of a value: torch's decisions, and ours to keep a part of it on each rank.
Ruling: TypeAlias = CheckpointPolicy | Sharding


class PolicyReturnError(CkptPassError):
    """A policy returned something that is not a decision."""


class CompiledShardError(CkptPassError):
    """A policy shards values where only an eager region can."""


def check_decision(
    decision: Any, maker: object, where: object = "", offloads: bool = True, shards: bool = False
) -> Ruling:
    """Return ``decision`` if it is one that is carried out.

    Args:
        decision: what a policy answered.
        maker: the policy, for the message.
        where: the call site, likewise.
        offloads: whether values can be offloaded there.
        shards: whether they can be kept in parts there.

    Raises:
        PolicyReturnError: it is not.
        CompiledShardError: it is a sharding, and cannot be carried out there.
    """
    if decision in SAVING or decision in RECOMPUTING or (offloads and decision in OFFLOADING):
        return decision  # type: ignore[no-any-return]
    at = f" at {where}" if where else ""
    if isinstance(decision, Sharding):
        if shards:
            return decision
        raise CompiledShardError(
            f"Policy {maker} shards{at}, which is there in eager regions only: nothing in a "
            "compiled graph, or in a plan of one, gathers values for the backward. Expected save, "
            "recompute or offload. Run the region in eager mode (ckpt_pass.checkpoint, apply or "
            "context_fn without torch.compile), or give another rule here."
        )
    if isinstance(decision, CheckpointPolicy):
        raise PolicyReturnError(
            f"Policy {maker} returned {decision.name}{at}; offloading is not supported in a "
            "compiled graph, but as the policy of a ckpt backend. Return MUST_SAVE, PREFER_SAVE, "
            "MUST_RECOMPUTE or PREFER_RECOMPUTE, or run the region in eager mode."
        )
    raise PolicyReturnError(
        f"Policy {maker} returned {decision!r}{at}, expected a member of "
        "torch.utils.checkpoint.CheckpointPolicy, or None for no opinion."
    )
