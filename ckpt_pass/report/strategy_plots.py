"""Pictures of a comparison: memory over time, the trade-off, bars; and a heatmap of layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_pass.drawing.figures import (
    COLOURS,
    GREY,
    MEGABYTE,
    figure_of,
    missing_extra,
    open_frame,
    write,
)
from ckpt_pass.drawing.memory import MemoryCurve, plot_comparison
from ckpt_pass.modules.layers.layer_profile import LayerProfile
from ckpt_pass.report.strategy_rows import ComparisonRecord, StrategyRow, recompute_share, time_s
from ckpt_pass.report.sweeps import front, label_points, renderer_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Curves in one picture of memory over time: as many as there are colours.
MOST_CURVES = len(COLOURS)
#: Layers in a heatmap that have room for their figures.
MOST_FIGURES = 16

Cost = Callable[[StrategyRow], "float | None"]


def save_plots(
    found: ComparisonRecord, folder: Path, profiles: Sequence[LayerProfile] = ()
) -> tuple[Path, ...]:
    """Draw everything into a folder, which is made: timelines, trade-off, bars, and layers.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [
        plot_timelines(found, folder / "timelines.png"),
        plot_tradeoff(found, folder / "tradeoff.png"),
        plot_bars(found, folder / "bars.png"),
    ]
    if profiles:
        paths.append(plot_layers(profiles, folder / "layers.png"))
    return tuple(paths)


# --- memory over time -----------------------------------------------------------------------


def plot_timelines(found: ComparisonRecord, path: Path, names: Sequence[str] | None = None) -> Path:
    """Draw memory over the step, plain and with strategies.

    Args:
        found: the comparison.
        path: of the PNG.
        names: which strategies; the plain step, and those on the front of peak and recomputed
            flops, where ``None``; of more than six the first ones.

    Raises:
        UnknownStrategyError: a name is not in the comparison.
        MissingExtraError: matplotlib is not installed.
    """
    if names is None:
        best = [row for row in reversed(found.front) if row.name != found.plain.name]
        rows = [found.plain, *best]
    else:
        rows = [found.of(name) for name in names]
    curves = [
        MemoryCurve(row.name, row.timeline, row.peak_bytes or 0, row.backward_at_s or 0.0)
        for row in rows[:MOST_CURVES]
        if row.timeline
    ]
    return plot_comparison(f"{found.title}: memory of a step", {"": curves}, path)


# --- the trade-off --------------------------------------------------------------------------


def plot_tradeoff(found: ComparisonRecord, path: Path) -> Path:
    """Draw peak against recomputed flops and against time; a line joins the Pareto front.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = figure_of(width=12.0, height=5.5)
    figure.suptitle(f"{found.title}: peak against its price")
    left = figure.add_subplot(1, 2, 1)
    right = figure.add_subplot(1, 2, 2, sharey=left)
    left.set_ylabel("measured peak above the start (MB)")
    panels = (
        (left, recompute_share, 100.0, "recomputed flops (% of the step's)"),
        (right, time_s, 1e3, f"time of a step (ms, median of {found.rounds})"),
    )
    for axes, cost, factor, label in panels:
        _scatter(axes, found.rows, cost, factor)
        axes.set_xlabel(label)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    renderer = renderer_of(figure)
    figure.draw_without_rendering()  # settles where the points are
    for axes, cost, factor, _ in panels:
        words = [
            (_point(row, cost, factor), row.name, _colour(row))
            for row in found.rows
            if cost(row) is not None and row.peak_bytes is not None
        ]
        label_points(renderer, axes, words)
    return write(figure, path)


def _scatter(axes: Axes, rows: Sequence[StrategyRow], cost: Cost, factor: float) -> None:
    best = front(rows, cost)
    line = [_point(row, cost, factor) for row in best]
    # What a point costs is enough for every higher peak too: steps, not slopes.
    axes.plot(
        [x for x, _ in line],
        [y for _, y in line],
        color=GREY,
        linewidth=1.2,
        drawstyle="steps-post",
        label="Pareto front",
    )
    for filled, group in ((True, best), (False, [row for row in rows if row not in best])):
        for row in group:
            if cost(row) is None or row.peak_bytes is None:
                continue
            x, y = _point(row, cost, factor)
            style = "full" if filled else "none"
            axes.plot([x], [y], "o", color=_colour(row), fillstyle=style)
    axes.plot([], [], "o", color=COLOURS[2], label="a plan for a budget")
    axes.plot([], [], "o", color=COLOURS[1], label="a placement, with or without a policy")
    axes.grid(color=GREY, alpha=0.2)
    open_frame(axes)
    axes.margins(x=0.12, y=0.1)


def _point(row: StrategyRow, cost: Cost, factor: float) -> tuple[float, float]:
    return (cost(row) or 0.0) * factor, (row.peak_bytes or 0) / MEGABYTE


def _colour(row: StrategyRow) -> str:
    return COLOURS[2] if row.name.startswith(("budget=", "plan ")) else COLOURS[1]


# --- bars -----------------------------------------------------------------------------------


def plot_bars(found: ComparisonRecord, path: Path) -> Path:
    """Draw the peak of each strategy, measured and predicted, and its time.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    rows = [row for row in found.rows if row.peak_bytes is not None][::-1]
    figure = figure_of(width=11.0, height=1.6 + 0.36 * len(rows))
    figure.suptitle(found.title)
    left = figure.add_subplot(1, 2, 1)
    right = figure.add_subplot(1, 2, 2, sharey=left)
    names = [row.name for row in rows]
    peaks = [(row.peak_bytes or 0) / MEGABYTE for row in rows]
    saved = [(row.saved_bytes or 0) / MEGABYTE for row in rows]
    colours = [_colour(row) for row in rows]
    left.barh(names, peaks, color=colours, alpha=0.35, label="peak, measured")
    left.barh(names, saved, color=colours, alpha=0.6, height=0.3, label="saved for the backward")
    predicted = [
        (row.predicted_bytes / MEGABYTE, number)
        for number, row in enumerate(rows)
        if row.predicted_bytes is not None
    ]
    left.plot(
        [x for x, _ in predicted],
        [y for _, y in predicted],
        "|",
        color="black",
        markersize=14,
        label="peak, predicted",
    )
    left.set_xlabel("memory above the start (MB)")
    _write_at_ends(left, peaks, [_less(row) for row in rows])
    times = [(row.time_s or 0.0) * 1e3 for row in rows]
    right.barh(names, times, color=colours, alpha=0.35)
    right.tick_params(labelleft=False)
    right.set_xlabel(f"time of a step (ms, median of {found.rounds})")
    _write_at_ends(right, times, [_more(row) for row in rows])
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    for axes in (left, right):
        open_frame(axes)
        axes.margins(x=0.2)
    return write(figure, path)


def _less(row: StrategyRow) -> str:
    less = f" (-{row.saving:.0%})" if row.saving and row.saving > 0 else ""
    return f"{(row.peak_bytes or 0) / MEGABYTE:.1f}{less}"


def _more(row: StrategyRow) -> str:
    if row.time_s is None:
        return ""
    more = f" ({row.overhead:+.0%})" if row.overhead else ""
    return f"{row.time_s * 1e3:.1f}{more}"


def _write_at_ends(axes: Axes, lengths: Sequence[float], words: Sequence[str]) -> None:
    for number, (length, text) in enumerate(zip(lengths, words, strict=True)):
        axes.annotate(
            text,
            (length, number),
            xytext=(4, 0),
            textcoords="offset points",
            verticalalignment="center",
            fontsize=8,
        )


# --- layers ---------------------------------------------------------------------------------


def plot_layers(profiles: Sequence[LayerProfile], path: Path) -> Path:
    """Draw a heatmap of layers: bytes and times, each row by its own largest value.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with missing_extra("plot"):
        from matplotlib.colors import LinearSegmentedColormap
    measures: tuple[tuple[str, list[float]], ...] = (
        ("activations (MB)", [p.activation_bytes / MEGABYTE for p in profiles]),
        ("output (MB)", [p.output_bytes / MEGABYTE for p in profiles]),
        ("forward (ms)", [p.forward_s * 1e3 for p in profiles]),
        ("backward (ms)", [p.backward_s * 1e3 for p in profiles]),
        ("parameters (M)", [p.parameters / 1e6 for p in profiles]),
    )
    shares = [[value / (max(row) or 1.0) for value in row] for _, row in measures]
    figure = figure_of(width=max(7.0, min(2.5 + 0.62 * len(profiles), 16.0)), height=4.2)
    axes = figure.add_subplot()
    axes.set_title("layers: bytes and times; a row's darkest is its largest")
    colours = LinearSegmentedColormap.from_list("bytes", ["#FFFFFF", COLOURS[1]])
    axes.imshow(shares, aspect="auto", cmap=colours, vmin=0, vmax=1.25)
    axes.set_yticks(range(len(measures)), [name for name, _ in measures])
    every = -(-len(profiles) // 24)  # names that have room
    places = range(0, len(profiles), every)
    names = _short([p.name for p in profiles])
    axes.set_xticks(places, [names[n] for n in places], rotation=60, ha="right", fontsize=8)
    if len(profiles) <= MOST_FIGURES:
        look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8}
        for row, (_, values) in enumerate(measures):
            for column, value in enumerate(values):
                axes.text(column, row, f"{value:.3g}", **look)
    axes.tick_params(length=0)
    return write(figure, path)


def _short(names: Sequence[str]) -> list[str]:
    """Names without the parts that all of them begin with."""
    parts = [name.split(".") for name in names]
    shared = 0
    while len(names) > 1 and all(
        len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts
    ):
        shared += 1
    return [".".join(part[shared:]) for part in parts]
