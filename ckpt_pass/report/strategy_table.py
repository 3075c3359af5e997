"""A comparison of strategies as a value and a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_pass._errors import CkptPassError, nearest
from ckpt_pass.drawing.figures import MEGABYTE
from ckpt_pass.report.sweeps import BEST, aligned, front, rich_table, shown

if TYPE_CHECKING:
    from rich.table import Table

PLAIN = "none"
HEADS = (
    "strategy", "regions", "peak MB", "predicted", "less", "saved MB", "recomputed", "ms", "more",
    "loss", "gradients", "",
)  # fmt: skip
_LEFT = (0, 9, 10, 11)
CAPTION = (
    f"{BEST}: no other has a lower peak at no more recomputation; less, more: against {PLAIN}; "
    "recomputed: flops by those of the step; loss, gradients: bit by bit"
)


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
class Comparison:
    """Strategies measured beside each other on one step; prints itself as a table.

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

    def save_plots(self, folder: str | Path) -> tuple[Path, ...]:
        """Draw timelines, trade-off and bars as PNGs into a folder; return their paths.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        from ckpt_pass.report.strategy_plots import save_plots  # drawn by a room beside this one

        return save_plots(self, Path(folder))

    def __str__(self) -> str:
        table = aligned([HEADS, *cells(self.rows)], _LEFT)
        times = f"times: medians of {self.rounds}, in turn"
        return "\n".join([self.title, "", *table, "", CAPTION, times])


def recompute_share(row: StrategyRow) -> float | None:
    """What a row recomputes."""
    return row.recompute_share


def time_s(row: StrategyRow) -> float | None:
    """How long a row takes."""
    return row.time_s


def cells(rows: Sequence[StrategyRow]) -> list[tuple[str, ...]]:
    """The table's cells, one tuple a row."""
    best = front(rows, recompute_share)
    return [
        (
            row.name,
            shown(row.regions, 1, "{:.0f}"),
            shown(row.peak_bytes, 1 / MEGABYTE, "{:.2f}"),
            shown(row.predicted_bytes, 1 / MEGABYTE, "{:.2f}"),
            shown(row.saving, 100, "{:.1f} %"),
            shown(row.saved_bytes, 1 / MEGABYTE, "{:.2f}"),
            shown(row.recompute_share, 100, "{:.1f} %"),
            shown(row.time_s, 1e3, "{:.1f}"),
            shown(row.overhead, 100, "{:+.1f} %"),
            _equality(row.loss_equal),
            _equality(row.equal),
            BEST if row in best else row.failure,
        )
        for row in rows
    ]


def _equality(equal: bool | None) -> str:
    return "" if equal is None else "equal" if equal else "DIFFERS"


def comparison_table(found: Comparison) -> Table:
    """The table for a terminal.

    Raises:
        MissingExtraError: rich is not installed.
    """
    table = rich_table(found.title, CAPTION, HEADS, _LEFT)
    for line in cells(found.rows):
        table.add_row(*line)
    return table
