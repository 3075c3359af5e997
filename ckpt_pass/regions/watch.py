"""Watch what the policies of checkpoint regions decide, in eager and while they are traced."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass, field

from ckpt_pass.policy.opinion import Opinion
from ckpt_pass.policy.sites import CallSite


@dataclass
class RegionRecord:
    """The decisions of one run of a checkpoint region.

    Attributes:
        traced: whether this was a trace under ``torch.compile`` (eager otherwise).
        decisions: each op execution in order and what the policy said of it.
    """

    traced: bool
    decisions: list[tuple[CallSite, Opinion]] = field(default_factory=list)

    @property
    def saved_sites(self) -> tuple[CallSite, ...]:
        """The call sites whose outputs the region saves, in order."""
        return tuple(
            site for site, found in self.decisions if found.saves and found.sharding is None
        )

    @property
    def offloaded_sites(self) -> tuple[CallSite, ...]:
        """The call sites whose outputs the region offloads, in order."""
        return tuple(site for site, found in self.decisions if found.offloads)

    @property
    def sharded_sites(self) -> tuple[CallSite, ...]:
        """The call sites of whose outputs the region keeps a part on each rank, in order."""
        return tuple(site for site, found in self.decisions if found.sharding is not None)


_watching: contextvars.ContextVar[list[RegionRecord] | None] = contextvars.ContextVar(
    "ckpt_pass_watching", default=None
)


@contextlib.contextmanager
def watch_regions() -> Iterator[list[RegionRecord]]:
    """Collect the decisions of every region that runs, or is traced, inside the ``with`` block.

    Regions are recorded in the order in which they start. Only those with one of this library's
    ``context_fn`` are seen.
    """
    records: list[RegionRecord] = []
    token = _watching.set(records)
    try:
        yield records
    finally:
        _watching.reset(token)


def new_record(traced: bool) -> RegionRecord | None:
    """A record for a region that starts now, or ``None`` when nobody watches."""
    records = _watching.get()
    if records is None:
        return None
    records.append(RegionRecord(traced))
    return records[-1]
