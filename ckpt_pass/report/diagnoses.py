"""What a job takes, whether it fits an amount of memory, and what would make it fit: as a value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ckpt_pass.job.totals import Cure
from ckpt_pass.planner.device import Device
from ckpt_pass.plans.account import Account
from ckpt_pass.plans.account_file import account_to_data
from ckpt_pass.plans.budget import DEVICE_RESERVE
from ckpt_pass.plans.curve import recompute_share
from ckpt_pass.plans.step_plan import StepPlan
from ckpt_pass.plans.value import Plan
from ckpt_pass.plans.wording import format_bytes


@dataclass(frozen=True)
class Diagnosis:
    """Whether a training job fits a total, and at what price; prints itself.

    Attributes:
        account: of the job, with the planned step; where none fits, with the one that takes least.
        plan: of the step; ``None`` where the job does not fit.
        cures: changes that would make it fit, each computed.
        short: changes that were tried likewise, and are not enough.
        device: the device on paper that it was planned for, if any.
    """

    account: Account
    plan: Plan | StepPlan | None
    cures: tuple[Cure, ...] = ()
    short: tuple[Cure, ...] = ()
    device: Device | None = None

    @property
    def fits(self) -> bool:
        """Whether there is a plan that keeps to the total."""
        return self.plan is not None

    @property
    def total_bytes(self) -> int:
        """What the job may take."""
        assert self.account.total_bytes is not None
        return self.account.total_bytes

    @property
    def needed_bytes(self) -> int:
        """What it takes as planned; where it does not fit, the least total that would do."""
        return self.account.peak_bytes

    @property
    def left_bytes(self) -> int:
        """What of the total is left; below zero what is missing."""
        return self.total_bytes - self.needed_bytes

    @property
    def plain_bytes(self) -> int | None:
        """What the job takes with nothing recomputed and nothing moved, where that is known."""
        if self.plan is None:
            return None
        peak = _plain_peak_bytes(self.plan)
        if peak is None:
            return None
        return self.account.with_step(peak, self.account.outputs_bytes).peak_bytes

    @property
    def recompute_share(self) -> float | None:
        """Modelled time of recomputing and waiting, by that of the step alone."""
        return None if self.plan is None else recompute_share(self.plan)

    def to_data(self) -> dict[str, Any]:
        """All of it but the plan, as plain data."""
        names = ("fits", "total_bytes", "needed_bytes", "left_bytes")
        return {
            **{name: getattr(self, name) for name in names},
            "plain_bytes": self.plain_bytes,
            "recompute_share": self.recompute_share,
            "account": account_to_data(self.account),
            "cures": list(map(asdict, self.cures)),
            "short": list(map(asdict, self.short)),
        }

    def __str__(self) -> str:
        blocks = [self._verdict(), self.account.lines(), self._plan(), self._cures()]
        return "\n\n".join("\n".join(block) for block in map(list, blocks) if block)

    def _verdict(self) -> Iterator[str]:
        total = f"{self.total_bytes:,} bytes ({format_bytes(self.total_bytes)})"
        if self.plan is None:
            yield (
                f"does not fit {total}: it needs {format_bytes(self.needed_bytes)} at least, "
                f"{format_bytes(-self.left_bytes)} are missing"
            )
            yield from self._why_not()
        else:
            yield f"fits {total}: {format_bytes(self.left_bytes)} are left"
            yield from self._price()
        if self.device is not None and self.total_bytes > self._room_bytes:
            yield (
                f"WARNING      the total is more than {self.device} has: "
                f"{format_bytes(self._room_bytes)}, {100 * DEVICE_RESERVE:.0f} % kept free"
            )

    @property
    def _room_bytes(self) -> int:
        """What a job may take of the device on paper."""
        assert self.device is not None
        return int(self.device.memory_bytes * (1 - DEVICE_RESERVE))

    def _price(self) -> Iterator[str]:
        plain, share = self.plain_bytes, self.recompute_share
        if share:
            yield f"recomputing takes {100 * share:.1f} % of the step's modelled time"
        else:
            yield "nothing that takes time is recomputed"
        if plain is not None and plain > self.total_bytes:
            more = format_bytes(plain - self.total_bytes)
            yield f"with nothing recomputed it would need {format_bytes(plain)}: {more} more"

    def _why_not(self) -> Iterator[str]:
        where = self.account.peak_phase
        yield (
            f"the peak is in the {where.name}, which adds {format_bytes(where.above_bytes or 0)} "
            f"to the {format_bytes(where.standing_bytes)} that stand there"
        )
        if where.standing_bytes > self.total_bytes:
            yield "what stands there is above the total: no plan of the step makes it fit"

    def _plan(self) -> Iterator[str]:
        if self.plan is not None:
            yield "the plan of forward and backward"
            yield from (f"  {line}".rstrip() for line in self.plan.summary().splitlines())

    def _cures(self) -> Iterator[str]:
        if self.plan is not None:
            return
        if self.cures:
            yield "what would make it fit, each computed"
            yield from _needs(self.cures)
        else:
            yield "no change that was tried makes it fit alone: give a larger total, smaller"
            yield "inputs, or an optimizer with less state"
        if self.short:
            yield "what is not enough alone"
            yield from _needs(self.short)


def _needs(cures: tuple[Cure, ...]) -> Iterator[str]:
    width = max(len(cure.words) for cure in cures)
    for cure in cures:
        yield f"  {cure.words:{width}}  needs {format_bytes(cure.needed_bytes):>10}"


def _plain_peak_bytes(plan: Plan | StepPlan) -> int | None:
    """The peak of a step with nothing recomputed; of generated code it is not known."""
    if isinstance(plan, StepPlan):
        return plan.plain_peak_bytes
    timeline = plan.predicted.plain_timeline
    return None if timeline is None or plan.inductor is not None else timeline.peak_bytes
