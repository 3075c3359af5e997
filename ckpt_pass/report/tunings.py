"""Ways to run a job's step, weighed against each other: as rows, a table, a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_pass.drawing.figures import (
    COLOURS,
    GREY,
    MEGABYTE,
    figure_of,
    open_frame,
    write,
)
from ckpt_pass.plans.step_plan import StepPlan
from ckpt_pass.plans.value import Plan
from ckpt_pass.plans.wording import format_bytes
from ckpt_pass.report.sweeps import aligned, rich_table, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

HEADS = (
    "microbatch", "steps", "way", "peak MB", "recomputed", "predicted/s", "measured/s", "",
)  # fmt: skip
_LEFT = (2, 7)
CHOSEN = "<- chosen"
CAPTION = (
    "steps: microbatches of a global batch; peak: of the whole job, predicted; recomputed:\n"
    "modelled time, with waiting for copies, by the step's own; predicted, measured: samples/s"
)
#: Colour and marker of each way, in the order in which they come.
_LOOKS = tuple(zip(COLOURS[1:], "osD^v", strict=True))


@dataclass(frozen=True)
class TuneRow:
    """One way to run a global batch.

    Attributes:
        microbatch: samples of one forward and backward.
        accumulate: microbatches that make up a global batch.
        way: ``compiled`` or ``eager``, and whether values may move, in words.
        peak_bytes: of the whole job, by the plan's account; what it would need at least where it
            does not fit.
        recompute_share: modelled time of recomputing, and of waiting for copies, by that of the
            forward and backward alone.
        modelled_s: of a global batch, by the modelled times of ops alone.
        predicted_s: the same, put right by what the other candidates took, where any were measured.
        measured_s: the same, as it was measured: beside the fastest, at the same time.
        failure: why there is no plan, or why it could not be measured.
        plan: of the forward and backward; ``None`` where none fits.
    """

    microbatch: int
    accumulate: int
    way: str
    peak_bytes: int | None = None
    recompute_share: float | None = None
    modelled_s: float | None = None
    predicted_s: float | None = None
    measured_s: float | None = None
    failure: str = ""
    plan: Plan | StepPlan | None = field(default=None, repr=False)

    @property
    def predicted_per_s(self) -> float | None:
        """Samples per second, predicted."""
        return self._rate(self.predicted_s)

    @property
    def measured_per_s(self) -> float | None:
        """Samples per second, measured."""
        return self._rate(self.measured_s)

    @property
    def samples_per_s(self) -> float | None:
        """Measured where it was, else predicted."""
        return self.predicted_per_s if self.measured_s is None else self.measured_per_s

    def _rate(self, seconds: float | None) -> float | None:
        return self.microbatch * self.accumulate / seconds if seconds else None


@dataclass(frozen=True)
class Tuned:
    """How to train a model fastest within an amount of memory; prints itself as a table.

    Attributes:
        rows: all that was weighed, by way and microbatch.
        chosen: the place of the choice among them.
        model: the model's class.
        job: the optimizers and how gradients are kept, in words.
        device: that of the account, in words.
        total_bytes: what the job may take.
        global_batch: samples of an optimizer's step.
        update_s: seconds of the optimizer's step, which every row's time holds once.
        rounds: timings of each that was measured, before the fastest of them are timed in turn; 0
            where none was.
    """

    rows: tuple[TuneRow, ...]
    chosen: int
    model: str
    job: str
    device: str
    total_bytes: int
    global_batch: int
    update_s: float
    rounds: int

    @property
    def choice(self) -> TuneRow:
        """The row with the most samples per second, measured where anything was."""
        return self.rows[self.chosen]

    @property
    def microbatch(self) -> int:
        """Samples of one forward and backward of the choice."""
        return self.choice.microbatch

    @property
    def accumulate(self) -> int:
        """Microbatches of a global batch of the choice."""
        return self.choice.accumulate

    @property
    def plan(self) -> Plan | StepPlan:
        """The plan of the choice."""
        assert self.choice.plan is not None
        return self.choice.plan

    @property
    def title(self) -> str:
        """What was asked, in words."""
        return (
            f"{self.model}, global batch {self.global_batch}, {format_bytes(self.total_bytes)} on "
            f"{self.device}"
        )

    @property
    def measured(self) -> tuple[TuneRow, ...]:
        """The rows that were measured."""
        return tuple(row for row in self.rows if row.measured_s is not None)

    def plot(self, path: str | Path) -> Path:
        """Draw samples per second and recomputation against the microbatch as a PNG.

        Returns:
            Its path.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        return plot_tuned(self, Path(path))

    def save_plot(self, path: str | Path) -> Path:
        """The same as :meth:`plot`."""
        return self.plot(path)

    def lines(self) -> Iterator[str]:
        """The choice in a few lines."""
        row = self.choice
        yield f"fastest      {row.accumulate} x {row.microbatch} samples, {row.way}"
        predicted, measured = row.predicted_per_s, row.measured_per_s
        words = [f"{_per_s(predicted)} predicted"] if predicted else []
        words += [f"{_per_s(measured)} measured"] if measured else []
        yield f"samples/s    {', '.join(words)}"
        again = shown(row.recompute_share, 100, "{:.1f} %")
        yield f"recomputes   {again} of the step's modelled time"
        peak, total = format_bytes(row.peak_bytes or 0), format_bytes(self.total_bytes)
        yield f"peak         {peak} of {total} for the whole job"
        yield f"optimizer    {self.update_s * 1e3:,.3g} ms a step ({self.job})"

    def __str__(self) -> str:
        table = aligned([HEADS, *cells(self)], _LEFT)
        return "\n".join(
            [self.title, "", *table, "", CAPTION, _measurements(self), "", *self.lines()]
        )


def _measurements(found: Tuned) -> str:
    count, fitting = len(found.measured), sum(row.plan is not None for row in found.rows)
    if not count:
        return f"nothing was measured; {fitting} candidates fit"
    return (
        f"{count} of {fitting} candidates that fit were measured: medians of {found.rounds}, "
        "the fastest in turn"
    )


def cells(found: Tuned) -> list[tuple[str, ...]]:
    """The table's cells, one tuple a row."""
    return [
        (
            str(row.microbatch),
            str(row.accumulate),
            row.way,
            shown(row.peak_bytes, 1 / MEGABYTE, "{:,.1f}"),
            shown(row.recompute_share, 100, "{:.1f} %"),
            _per_s(row.predicted_per_s),
            _per_s(row.measured_per_s),
            CHOSEN if number == found.chosen else row.failure,
        )
        for number, row in enumerate(found.rows)
    ]


def _per_s(rate: float | None) -> str:
    return "" if rate is None else f"{rate:,.4g}" if rate < 1e4 else f"{rate:,.0f}"


def tuned_table(found: Tuned) -> Table:
    """The table for a terminal.

    Raises:
        MissingExtraError: rich is not installed.
    """
    table = rich_table(found.title, f"{CAPTION}\n{_measurements(found)}", HEADS, _LEFT)
    way = found.rows[0].way
    for row, line in zip(found.rows, cells(found), strict=True):
        if row.way != way:
            way = row.way
            table.add_section()
        table.add_row(*line)
    return table


# --- the picture ----------------------------------------------------------------------------


def plot_tuned(found: Tuned, path: Path) -> Path:
    """Draw samples per second against the microbatch, below it what is recomputed, and the peak.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = figure_of(width=8.5, height=7.5)
    figure.suptitle(found.title)
    axes = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1.2, 1.2))
    rates, again, peaks = axes
    sizes = sorted({row.microbatch for row in found.rows if row.plan is not None})
    ways = dict.fromkeys(row.way for row in found.rows if row.plan is not None)
    for (colour, marker), way in zip(_LOOKS, ways, strict=False):
        rows = [row for row in found.rows if row.way == way and row.plan is not None]
        _draw_way(axes, rows, colour, marker)
    _mark_choice(rates, found.choice)
    rates.set_ylabel("samples per second")
    again.set_ylabel("recomputed\n(% of the step)")
    peaks.set_ylabel("job's peak\n(MB)")
    peaks.set_xlabel("microbatch (samples of a forward and backward)")
    peaks.axhline(found.total_bytes / MEGABYTE, color=COLOURS[0], linestyle=":", linewidth=1.2)
    peaks.annotate(
        f"total {found.total_bytes / MEGABYTE:,.0f} MB",
        (0.01, found.total_bytes / MEGABYTE),
        xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
        color=COLOURS[0], fontsize=9,
    )  # fmt: skip
    peaks.set_xscale("log", base=2)
    peaks.set_xticks(sizes, [str(size) for size in sizes])
    peaks.minorticks_off()
    for part in axes:
        part.set_ylim(0, max(part.get_ylim()[1] * 1.15, 1))
        part.grid(axis="y", color=GREY, alpha=0.2)
        open_frame(part)
    handles, labels = rates.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return write(figure, path)


def _draw_way(axes: Sequence[Axes], rows: Sequence[TuneRow], colour: str, marker: str) -> None:
    rates, again, peaks = axes
    way, sizes = rows[0].way, [row.microbatch for row in rows]
    # The line goes through what was measured, where anything was.
    best = [row.samples_per_s or 0.0 for row in rows]
    rates.plot(sizes, best, "--", color=colour, linewidth=1.2)
    look: dict[str, Any] = {"marker": marker, "color": colour, "linestyle": ""}
    for words, is_measured in (("predicted", False), ("measured", True)):
        points = [row for row in rows if (row.measured_s is not None) is is_measured]
        if points:
            x, y = [row.microbatch for row in points], [row.samples_per_s or 0.0 for row in points]
            fill = "full" if is_measured else "none"
            rates.plot(x, y, fillstyle=fill, markersize=8, label=f"{way}: {words}", **look)
    shares = [100 * (row.recompute_share or 0.0) for row in rows]
    again.plot(sizes, shares, "-", marker=marker, color=colour, linewidth=1.2)
    heights = [(row.peak_bytes or 0) / MEGABYTE for row in rows]
    peaks.plot(sizes, heights, "-", marker=marker, color=colour, linewidth=1.2)


def _mark_choice(axes: Axes, row: TuneRow) -> None:
    rate = row.samples_per_s or 0.0
    axes.plot(
        [row.microbatch], [rate], "o", markersize=18, fillstyle="none", color=COLOURS[0],
        markeredgewidth=1.6, label=f"chosen: {row.accumulate} x {row.microbatch}, {row.way}",
    )  # fmt: skip
