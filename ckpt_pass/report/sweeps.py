"""A trade-off curve as rows, a table and a picture."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from ckpt_pass.drawing.figures import (
    COLOURS,
    GREY,
    MEGABYTE,
    figure_of,
    missing_extra,
    open_frame,
    write,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox
    from rich.table import Table

OURS, TORCH, BLOCKS = "ckpt_pass", "torch", "per block"
#: Colour and marker of each family: told apart without colours too.
LOOKS = {OURS: (COLOURS[1], "o"), TORCH: (COLOURS[2], "s"), BLOCKS: (COLOURS[3], "D")}
HEADS = ("", "setting", "peak MB", "predicted", "recomputed", "ms", "x", "")
_LEFT = (0, 1, 7)
BEST = "*"
CAPTION = (
    f"{BEST}: no point has a lower peak at no more recomputation; x: time against no recomputation"
)
#: Half the size of a marker, in pixels of a figure that is not saved yet.
_RADIUS = 4.0
#: How far words may stand out of the axes to the right, in the same pixels.
_OVERHANG = 8.0
#: Points from a marker to its words, and how the words stand to that place, in order of choice.
_PLACES = ((6, 5, "left"), (6, -13, "left"), (-6, 5, "right"), (-6, -13, "right"))


@dataclass(frozen=True)
class SweepRow:
    """One measured point.

    Attributes:
        family: ``ckpt_pass``, ``torch`` (``activation_memory_budget``), or ``per block`` (a
            checkpoint around each repeated layer).
        setting: of that family, in words.
        budget_bytes: what the plan had to stay within.
        predicted_bytes: the plan's peak, where the step was compiled as one graph.
        peak_bytes, flops: of the step that ran (:func:`ckpt_pass.measure_step`).
        recompute_share: flops beyond those of the plan that recomputes nothing, as a share of
            those; below 0 where that plan repeats something that takes no time.
        time_s: the median of several runs, all points in turn.
        failure: why there are no figures.
    """

    family: str
    setting: str
    budget_bytes: int | None = None
    predicted_bytes: int | None = None
    peak_bytes: int | None = None
    flops: int | None = None
    recompute_share: float | None = None
    time_s: float | None = None
    failure: str = ""


Measure = Callable[[SweepRow], "float | None"]


class Measured(Protocol):
    """A row of any table of measured steps."""

    @property
    def peak_bytes(self) -> int | None:
        """Of the step that ran."""


AnyRow = TypeVar("AnyRow", bound=Measured)


def front(rows: Sequence[AnyRow], cost: Callable[[AnyRow], float | None]) -> tuple[AnyRow, ...]:
    """The rows that no other one beats in both peak and cost, by falling peak."""
    known = [row for row in rows if row.peak_bytes is not None and cost(row) is not None]
    found: list[AnyRow] = []
    for row in sorted(known, key=lambda r: (cost(r) or 0.0, r.peak_bytes or 0)):
        if not found or (row.peak_bytes or 0) < (found[-1].peak_bytes or 0):
            found.append(row)
    return tuple(found)


def recompute_share(row: SweepRow) -> float | None:
    """What a row recomputes; the cost on the left of the picture."""
    return row.recompute_share


def time_s(row: SweepRow) -> float | None:
    """How long a row takes; the cost on the right."""
    return row.time_s


# --- tables ---------------------------------------------------------------------------------


def cells(rows: Sequence[SweepRow]) -> list[tuple[str, ...]]:
    """The table's cells, one tuple a row; the family is named where it changes."""
    best = front(rows, recompute_share)
    plain = next((row.time_s for row in reversed(rows) if row.family == OURS), None)
    found: list[tuple[str, ...]] = []
    family = ""
    for row in rows:
        name = row.family if row.family != family else ""
        family = row.family
        last = BEST if row in best else row.failure
        figures = (
            shown(row.peak_bytes, 1 / MEGABYTE, "{:.2f}"),
            shown(row.predicted_bytes, 1 / MEGABYTE, "{:.2f}"),
            shown(row.recompute_share, 100, "{:.1f} %"),
            shown(row.time_s, 1e3, "{:.1f}"),
            shown(row.time_s, 1 / plain, "{:.2f}") if plain else "",
        )
        found.append((name, row.setting, *figures, last))
    return found


def shown(value: float | None, factor: float, form: str) -> str:
    """A figure as text; empty where there is none."""
    # Adding 0.0 makes a rounded -0.0 a 0.0.
    return "" if value is None else form.format(round(value * factor, 2) + 0.0)


def sweep_text(rows: Sequence[SweepRow]) -> str:
    """The table as plain text."""
    return "\n".join([*aligned([HEADS, *cells(rows)], _LEFT), "", CAPTION])


def aligned(table: Sequence[Sequence[str]], left: Collection[int]) -> list[str]:
    """The lines of a table, its columns aligned: those in ``left`` to the left."""
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = []
    for line in table:
        padded = [
            text.ljust(width) if column in left else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


def rich_table(title: str, caption: str, heads: Sequence[str], left: Collection[int]) -> Table:
    """An empty table for a terminal; its last column may be wrapped.

    Raises:
        MissingExtraError: rich is not installed.
    """
    with missing_extra("cli"):
        from rich import box
        from rich.table import Table
    table = Table(box=box.SIMPLE_HEAD, title=title, caption=caption)
    for column, head in enumerate(heads):
        justify: Literal["left", "right"] = "left" if column in left else "right"
        table.add_column(head, justify=justify, no_wrap=column != len(heads) - 1)
    return table


def sweep_table(title: str, rows: Sequence[SweepRow]) -> Table:
    """The table for a terminal.

    Raises:
        MissingExtraError: rich is not installed.
    """
    table = rich_table(title, CAPTION, HEADS, _LEFT)
    for number, line in enumerate(cells(rows)):
        if line[0] and number:
            table.add_section()
        table.add_row(*line)
    return table


# --- the picture ----------------------------------------------------------------------------


def plot_sweep(title: str, rows: Sequence[SweepRow], path: Path) -> Path:
    """Draw peak against recomputed flops and against time, a line for each family's best.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = figure_of(width=12.0, height=5.5)
    figure.suptitle(title)
    left = figure.add_subplot(1, 2, 1)
    right = figure.add_subplot(1, 2, 2, sharey=left)
    left.set_ylabel("measured peak above the start (MB)")
    _panel(left, rows, recompute_share, 100, "recomputed flops (% of the step without)")
    _panel(right, rows, time_s, 1e3, "time of a step (ms, median)")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    renderer = renderer_of(figure)
    figure.draw_without_rendering()  # settles where the points are
    _label(renderer, left, rows, recompute_share, 100)
    _label(renderer, right, rows, time_s, 1e3)
    return write(figure, path)


def _panel(axes: Axes, rows: Sequence[SweepRow], cost: Measure, factor: float, name: str) -> None:
    axes.set_xlabel(name)
    axes.grid(color=GREY, alpha=0.2)
    open_frame(axes)
    for family, (colour, marker) in LOOKS.items():
        own = [row for row in rows if row.family == family]
        points = _points(own, cost, factor)
        if not points:
            continue
        best = _points(front(own, cost), cost, factor)
        # What a point costs is enough for every higher peak too: steps, not slopes.
        axes.plot(*_across(best), color=colour, linewidth=1.3, drawstyle="steps-post", alpha=0.7)
        rest = [point for point in points if point not in best]
        look: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": ""}
        axes.plot(*_across(rest), fillstyle="none", **look)
        axes.plot(*_across(best), label=_legend(family), **look)
    axes.margins(x=0.08, y=0.08)


def _legend(family: str) -> str:
    words = {
        OURS: "ckpt_pass: budget",
        TORCH: "torch: activation_memory_budget",
        BLOCKS: "torch.utils.checkpoint: every layer",
    }
    return words[family]


def _points(rows: Sequence[SweepRow], cost: Measure, factor: float) -> list[tuple[float, float]]:
    found = []
    for row in rows:
        paid = cost(row)
        if paid is not None and row.peak_bytes is not None:
            found.append((paid * factor, row.peak_bytes / MEGABYTE))
    return found


def _across(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def renderer_of(figure: Figure) -> Any:
    """What knows how large words are."""
    with missing_extra("plot"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    canvas: Any = FigureCanvasAgg(figure)
    return canvas.get_renderer()


def _label(
    renderer: Any, axes: Axes, rows: Sequence[SweepRow], cost: Measure, factor: float
) -> None:
    """Write each point's setting beside it, where there is room; ours have the first choice."""
    points = [
        (point, row.setting.removeprefix("budget "), LOOKS[row.family][0])
        for row in rows
        for point in _points([row], cost, factor)
    ]
    label_points(renderer, axes, points)


def label_points(
    renderer: Any, axes: Axes, points: Sequence[tuple[tuple[float, float], str, str]]
) -> None:
    """Write words beside points, where there is room; the first ones have the first choice.

    Args:
        renderer: of the figure (:func:`renderer_of`), whose layout is settled.
        axes: that the points are in.
        points: each with its words and its colour.
    """
    taken = [_marker(axes, point) for point, _, _ in points]
    for point, text, colour in points:
        _write_beside(renderer, axes, point, text, colour, taken)


def _marker(axes: Axes, point: tuple[float, float]) -> Bbox:
    """The place on the picture that a point's marker takes."""
    from matplotlib.transforms import Bbox

    x, y = axes.transData.transform(point)
    return Bbox.from_bounds(x - _RADIUS, y - _RADIUS, 2 * _RADIUS, 2 * _RADIUS)


def _write_beside(
    renderer: Any,
    axes: Axes,
    at: tuple[float, float],
    text: str,
    colour: str,
    taken: list[Bbox],
) -> None:
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2, foreground="white")]  # lines run behind the words
    for right, up, side in _PLACES:
        words = axes.annotate(
            text,
            at,
            xytext=(right, up),
            textcoords="offset points",
            horizontalalignment=side,
            fontsize=7.5,
            color=colour,
            in_layout=False,
            path_effects=halo,
        )
        box = words.get_window_extent(renderer)
        fits = box.x1 <= axes.bbox.x1 + _OVERHANG
        if fits and not any(box.overlaps(other) for other in taken):
            taken.append(box)
            return
        words.remove()
