"""A comparison of strategies as a value and a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_pass.drawing.figures import MEGABYTE
from ckpt_pass.report.strategy_plots import save_plots
from ckpt_pass.report.strategy_rows import PLAIN, ComparisonRecord, StrategyRow, recompute_share
from ckpt_pass.report.sweeps import BEST, aligned, front, rich_table, shown

if TYPE_CHECKING:
    from rich.table import Table

HEADS = (
    "strategy", "regions", "peak MB", "predicted", "less", "saved MB", "recomputed", "ms", "more",
    "loss", "gradients", "",
)  # fmt: skip
_LEFT = (0, 9, 10, 11)
CAPTION = (
    f"{BEST}: no other has a lower peak at no more recomputation; less, more: against {PLAIN}; "
    "recomputed: flops by those of the step; loss, gradients: bit by bit"
)


@dataclass(frozen=True)
class Comparison(ComparisonRecord):
    """Strategies measured beside each other on one step; prints itself as a table."""

    def save_plots(self, folder: str | Path) -> tuple[Path, ...]:
        """Draw timelines, trade-off and bars as PNGs into a folder; return their paths.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        return save_plots(self, Path(folder))

    def __str__(self) -> str:
        table = aligned([HEADS, *cells(self.rows)], _LEFT)
        times = f"times: medians of {self.rounds}, in turn"
        return "\n".join([self.title, "", *table, "", CAPTION, times])


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
