"""Keep single executions of ops in a region, or move single saved values, as a plan lists them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy

from ckpt_pass.ops.taxonomy import functional_twin, op_name
from ckpt_pass.policy.sites import SiteContext


@dataclass(frozen=True)
class Keeps:
    """The op executions of a region whose outputs are kept: a policy that counts in the region.

    Attributes:
        counts: which executions of an op, by its name, counted from 0 within the region.
        moved: those whose outputs are offloaded, likewise.
    """

    counts: tuple[tuple[str, tuple[int, ...]], ...] = ()
    moved: tuple[tuple[str, tuple[int, ...]], ...] = ()

    #: Module names are not looked at (read by the dispatch modes).
    needs_scopes = False

    @property
    def by_op(self) -> Mapping[str, tuple[int, ...]]:
        """The same by op."""
        return dict(self.counts)

    def lists(self, op: Any) -> bool:
        """Whether any execution of ``op`` is kept, or offloaded."""
        name = op_name(functional_twin(op))
        return any(name == listed for listed, _ in (*self.counts, *self.moved))

    def __call__(self, site: SiteContext) -> CheckpointPolicy | None:
        """Keep it, or offload it, if it is listed."""
        name, number = op_name(functional_twin(site.op)), site.scopes[0].op_index
        if number in dict(self.counts).get(name, ()):
            return CheckpointPolicy.MUST_SAVE
        if number in dict(self.moved).get(name, ()):
            return CheckpointPolicy.MUST_CPU_OFFLOAD
        return None


@dataclass(frozen=True)
class Moves:
    """What a module offloads: of what autograd saves in it, or its arguments.

    Attributes:
        numbers: those of the saved values, in the order in which they are saved, counted from 0.
        ahead: how many values are fetched before the backward asks for them.
        arguments: whether it is the arguments of a region that runs again.
    """

    numbers: frozenset[int]
    ahead: int
    arguments: bool = False
