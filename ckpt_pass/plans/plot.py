"""A plan as a picture: memory over the step, with nothing recomputed and as planned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_pass.drawing.figures import (
    COLOURS,
    GREY,
    MEGABYTE,
    figure_of,
    label_peak,
    megabytes,
    memory_axes,
    write,
)
from ckpt_pass.plans.link_use import LinkUse
from ckpt_pass.plans.timeline import Timeline
from ckpt_pass.plans.wording import format_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEFORE, AFTER, BUDGET = GREY, COLOURS[1], COLOURS[2]
#: Where words stand under the upper edge, as shares of the height: one line a curve.
_WORDS_AT = (0.99, 0.945)


def plot_plan(
    title: str,
    after: Timeline,
    before: Timeline | None,
    budget_bytes: int | None,
    path: Path,
    moved: LinkUse | None = None,
) -> Path:
    """Draw a plan's memory over modelled time as a PNG; return its path.

    Args:
        title: above the picture.
        after: the step as planned.
        before: the same step with nothing recomputed, if known.
        budget_bytes: drawn as a line, if any.
        path: of the PNG.
        moved: what leaves the device, if anything does; drawn below.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    link = moved if moved is not None and moved.values else None
    figure = figure_of(width=9.0, height=5.0 if link is None else 7.0)
    grid = figure.add_gridspec(2 if link else 1, 1, height_ratios=(5, 2) if link else None)
    axes = figure.add_subplot(grid[0])
    axes.set_title(title)
    curves = [(after, AFTER, "as planned")]
    if before is not None:
        curves.insert(0, (before, BEFORE, "nothing recomputed"))
    highest = max(curve.peak_bytes for curve, _, _ in curves)
    longest = max(curve.duration_s for curve, _, _ in curves)
    # A budget far above both curves would press them flat, and limits nothing.
    shows_budget = budget_bytes is not None and budget_bytes <= 1.1 * highest
    top = max(highest, budget_bytes or 0) if shows_budget else highest
    memory_axes(axes, "modelled time since the step began (ms)", longest * 1e3, top / MEGABYTE)
    for (curve, colour, name), height in zip(curves, reversed(_WORDS_AT), strict=False):
        _draw(axes, curve, colour, name)
        _mark_backward(axes, curve, colour, height)
    if shows_budget and budget_bytes is not None:
        _mark_budget(axes, budget_bytes)
    for curve, colour, _ in curves:
        label_peak(axes, curve.peak_at_s * 1e3, curve.peak_bytes / MEGABYTE, colour)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False)
    if link is not None:
        _draw_link(figure.add_subplot(grid[1], sharex=axes), link, after.duration_s)
    return write(figure, path)


def _draw_link(axes: Axes, link: LinkUse, longest_s: float) -> None:
    """Memory at the other place, and below it a bar for each copy."""
    ways = [value.transfer for value in link.values]
    changes = [(way.out_start_s, way.nbytes) for way in ways]
    changes += [(way.used_s, -way.nbytes) for way in ways]
    moments, level, levels = [0.0], 0, [0.0]
    for moment, nbytes in sorted(changes):
        level += nbytes
        moments.append(moment * 1e3)
        levels.append(level / MEGABYTE)
    top = max(levels)
    memory_axes(axes, "", longest_s * 1e3, top)
    axes.set_ylabel("there (MB)", labelpad=22)
    axes.set_ylim(-0.5 * top, 1.15 * top)
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= 1.15 * top])
    axes.set_title(f"{link.where}: at most {megabytes(top)}", fontsize=10)
    axes.step([*moments, longest_s * 1e3], [*levels, 0.0], where="post", color=AFTER)
    rows = (("out", "out_start_s", "out_end_s", 2), ("back", "in_start_s", "in_end_s", 3))
    for row, (name, start, end, colour) in enumerate(rows):
        spans = [(getattr(way, start) * 1e3, getattr(way, end) * 1e3) for way in ways]
        bars = [(begin, finish - begin) for begin, finish in spans]
        axes.broken_barh(bars, (-0.22 * top * (row + 1), 0.16 * top), color=COLOURS[colour])
        axes.text(0.0, -0.22 * top * (row + 1), f"{name} ", ha="right", fontsize=8)


def _draw(axes: Axes, curve: Timeline, colour: str, name: str) -> None:
    moments = [moment * 1e3 for moment in curve.begins_s]
    # The last op's bytes hold until the step ends.
    levels = [nbytes / MEGABYTE for nbytes in (*curve.bytes_at, *curve.bytes_at[-1:])]
    label = f"{name}: {format_seconds(curve.duration_s)}"
    axes.fill_between(moments, levels, step="post", color=colour, alpha=0.15)
    axes.step(moments, levels, where="post", color=colour, linewidth=1.2, label=label)


def _mark_backward(axes: Axes, curve: Timeline, colour: str, height: float) -> None:
    """A dotted line where a curve's backward begins, and words on both sides of it."""
    border = curve.backward_at_s * 1e3
    axes.axvline(border, color=colour, linestyle=":", linewidth=1.2)
    look: dict[str, Any] = {"color": colour, "verticalalignment": "top", "fontsize": 9}
    level = axes.get_ylim()[1] * height
    axes.text(border, level, "forward  ", horizontalalignment="right", **look)
    axes.text(border, level, "  backward", horizontalalignment="left", **look)


def _mark_budget(axes: Axes, budget_bytes: int) -> None:
    level = budget_bytes / MEGABYTE
    label = f"budget: {megabytes(level)}"
    axes.axhline(level, color=BUDGET, linestyle="--", linewidth=1.2, label=label)
