"""What a comparison of strategies measured: its rows, the plain step first."""

from __future__ import annotations

from dataclasses import dataclass, field

from ckpt_pass._errors import CkptPassError, nearest
from ckpt_pass.report.sweeps import front

PLAIN = "none"


class UnknownStrategyError(CkptPassError):
    """A comparison has no row of that name."""


@dataclass(frozen=True)
class StrategyRow:
    """One strategy, measured.

    Attributes:
        name: of the strategy.
        regions: how many checkpoint regions it makes.
        peak_bytes, saved_bytes, flops: of the step that ran (:func:`ckpt_pass.measure_step`).
        predicted_bytes: its peak as simulated; ``None`` where that is not known.
        recompute_flops: beyond the plain step's.
        recompute_share: the same by the plain step's.
        saving: what of the plain peak is saved, as a share.
        time_s: the median of several runs, all strategies in turn.
        overhead: time beyond the plain step's, as a share of it.
        loss_equal: whether the loss is the plain step's to the last bit.
        equal: whether gradients and buffers are, too.
        timeline: memory over the step: (seconds since its start, bytes above).
        backward_at_s: when its backward began.
        failure: why there are no figures.
    """

    name: str
    regions: int | None = None
    peak_bytes: int | None = None
    predicted_bytes: int | None = None
    saved_bytes: int | None = None
    flops: int | None = None
    recompute_flops: int | None = None
    recompute_share: float | None = None
    saving: float | None = None
    time_s: float | None = None
    overhead: float | None = None
    loss_equal: bool | None = None
    equal: bool | None = None
    timeline: tuple[tuple[float, int], ...] = field(default=(), repr=False)
    backward_at_s: float | None = None
    failure: str = ""


@dataclass(frozen=True)
class ComparisonRecord:
    """Strategies measured beside each other on one step.

    Attributes:
        rows: the plain step first.
        model: the model's class.
        device, torch_version, threads: where it was measured.
        rounds: timings of each strategy.
    """

    rows: tuple[StrategyRow, ...]
    model: str
    device: str
    torch_version: str
    threads: int
    rounds: int

    @property
    def title(self) -> str:
        """What was measured, in words."""
        threads = f"{self.threads} thread" + ("s" if self.threads > 1 else "")
        return f"{self.model}, eager, {self.device}, {threads}, torch {self.torch_version}"

    @property
    def plain(self) -> StrategyRow:
        """The step without regions."""
        return self.rows[0]

    @property
    def front(self) -> tuple[StrategyRow, ...]:
        """Those that no other one beats in peak and recomputed flops, by falling peak."""
        return front(self.rows, recompute_share)

    def of(self, name: str) -> StrategyRow:
        """The row of a strategy.

        Raises:
            UnknownStrategyError: it was not compared.
        """
        for row in self.rows:
            if row.name == name:
                return row
        names = [row.name for row in self.rows]
        raise UnknownStrategyError(
            f"There is no row {name!r} in this comparison.{nearest(name, names)} Expected one of "
            f"{', '.join(names)}."
        )


def recompute_share(row: StrategyRow) -> float | None:
    """What a row recomputes."""
    return row.recompute_share


def time_s(row: StrategyRow) -> float | None:
    """How long a row takes."""
    return row.time_s
