"""Keep single executions of ops in a region, as a plan lists them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy

from ckpt_pass.ops.taxonomy import functional_twin, op_name
from ckpt_pass.policy.sites import SiteContext
from ckpt_pass.regions.frame import Contexts
from ckpt_pass.regions.region import RegionMemory
from ckpt_pass.regions.sac import Owners, RecomputeMode


@dataclass(frozen=True)
class Keeps:
    """The op executions of a region whose outputs are kept: a policy that counts in the region.

    Attributes:
        counts: which executions of an op, by its name, counted from 0 within the region.
    """

    counts: tuple[tuple[str, tuple[int, ...]], ...] = ()

    #: Module names are not looked at (read by the dispatch modes).
    needs_scopes = False

    @property
    def by_op(self) -> Mapping[str, tuple[int, ...]]:
        """The same by op."""
        return dict(self.counts)

    def lists(self, op: Any) -> bool:
        """Whether any execution of ``op`` is kept."""
        return op_name(functional_twin(op)) in self.by_op

    def __call__(self, site: SiteContext) -> CheckpointPolicy | None:
        """Keep it, if it is listed."""
        kept = self.by_op.get(op_name(functional_twin(site.op)))
        if kept is None:
            return None
        return CheckpointPolicy.MUST_SAVE if site.scopes[0].op_index in kept else None


def rerun_context(owners: Owners) -> Contexts:
    """For a region that keeps nothing, but must not change its modules' buffers twice."""
    return None, RecomputeMode(RegionMemory(), owners=owners)
