"""Amounts of memory that add up, as bars side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ckpt_pass.drawing.figures import (
    COLOURS,
    GREY,
    MEGABYTE,
    figure_of,
    megabytes,
    open_frame,
    write,
)

#: One for each part of an account; and a light one for the last part: what comes and goes.
_FILLS = (COLOURS[1], COLOURS[0], COLOURS[4], COLOURS[3], COLOURS[5], GREY, "#56B4E9", "#882255")
_LAST = "#cfe3f3"


def plot_bars(
    title: str,
    words: str,
    bars: Mapping[str, Sequence[tuple[str, int]]],
    limit_bytes: int | None,
    path: Path,
) -> Path:
    """Draw a bar for each name, made of its parts, as a PNG; return its path.

    Args:
        title, words: above the picture, in two lines.
        bars: for each bar the names of its parts and their bytes, the same names in each.
        limit_bytes: drawn as a line, if any.
        path: of the PNG.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = figure_of(width=9.0, height=1.8 + 0.55 * len(bars))
    figure.suptitle(title)
    axes = figure.add_subplot()
    axes.set_title(words, fontsize=9)
    names = list(dict.fromkeys(name for parts in bars.values() for name, _ in parts))
    used = [name for name in names if any(dict(parts)[name] for parts in bars.values())]
    lefts = [0.0] * len(bars)
    for name in used:
        widths = [dict(parts)[name] / MEGABYTE for parts in bars.values()]
        fill = _LAST if name == names[-1] else _FILLS[names.index(name) % len(_FILLS)]
        axes.barh(range(len(bars)), widths, left=lefts, color=fill, label=name, height=0.7)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    for row, left in enumerate(lefts):
        axes.text(left, row, f" {megabytes(left)}", va="center", fontsize=9)
    if limit_bytes is not None:
        limit = limit_bytes / MEGABYTE
        label = f"total: {megabytes(limit)}"
        axes.axvline(limit, color=COLOURS[2], linestyle="--", linewidth=1.2, label=label)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(*lefts, (limit_bytes or 0) / MEGABYTE) or 1.0)
    axes.set_xlabel("memory (MB)")
    axes.grid(axis="x", color=GREY, alpha=0.2)
    open_frame(axes)
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.2), ncols=4, frameon=False, fontsize=9)
    return write(figure, path)
