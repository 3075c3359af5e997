"""Plots of memory over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_pass.drawing.figures import (
    COLOURS,
    GREY,
    figure_of,
    label_peak,
    megabytes,
    memory_axes,
    write,
)
from ckpt_pass.drawing.figures import MEGABYTE as MEGABYTE
from ckpt_pass.drawing.figures import MissingExtraError as MissingExtraError
from ckpt_pass.drawing.figures import missing_extra as missing_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class MemoryCurve:
    """Memory over one training step.

    Attributes:
        title: what was measured.
        timeline: (seconds since the start, bytes above the start), as measured.
        peak_bytes: the highest of them.
        backward_at_s: when the backward began, in seconds since the start.
    """

    title: str
    timeline: tuple[tuple[float, int], ...]
    peak_bytes: int
    backward_at_s: float

    @property
    def milliseconds(self) -> list[float]:
        return [moment * 1e3 for moment, _ in self.timeline]

    @property
    def megabytes(self) -> list[float]:
        return [nbytes / MEGABYTE for _, nbytes in self.timeline]

    def at(self, moment_s: float) -> int:
        """Bytes at a moment."""
        return next((n for moment, n in reversed(self.timeline) if moment <= moment_s), 0)

    @property
    def peak_at_s(self) -> float:
        """The first moment at which the peak is reached."""
        return max(self.timeline, key=lambda point: point[1])[0]


def plot_memory(curve: MemoryCurve, path: Path) -> Path:
    """Draw one step's memory over time as a PNG; return its path.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = figure_of(width=8.0, height=4.5)
    axes = figure.add_subplot()
    axes.set_title(curve.title)
    axes.fill_between(curve.milliseconds, curve.megabytes, step="post", color=COLOURS[1], alpha=0.2)
    axes.step(curve.milliseconds, curve.megabytes, where="post", color=COLOURS[1], linewidth=1.2)
    _scale(axes, curve.milliseconds[-1], curve.peak_bytes / MEGABYTE)
    _mark_backward(axes, curve)
    label_peak(axes, curve.peak_at_s * 1e3, curve.peak_bytes / MEGABYTE, COLOURS[2])
    return write(figure, path)


def plot_comparison(title: str, panels: Mapping[str, Sequence[MemoryCurve]], path: Path) -> Path:
    """Draw several steps over each other, one panel a group, all to one scale; return the path.

    Curves of the same title have the same colour. A dot is a peak, a dotted line the moment at
    which the backward begins.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = figure_of(width=12.0 if len(panels) > 1 else 9.0, height=5.0)
    figure.suptitle(title)
    everything = [curve for curves in panels.values() for curve in curves]
    highest = max(curve.peak_bytes for curve in everything)
    titles = list(dict.fromkeys(curve.title for curve in everything))
    shared: Axes | None = None
    for number, (name, curves) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), number, sharey=shared)
        shared = shared or axes
        axes.set_title(name)
        for curve in curves:
            _draw(axes, curve, COLOURS[titles.index(curve.title) % len(COLOURS)])
        longest = max(curve.milliseconds[-1] for curve in curves)
        _scale(axes, longest, highest / MEGABYTE)
        # Below the axes: wherever else it stood, a curve of some model would run through it.
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    return write(figure, path)


def _scale(axes: Axes, end_ms: float, highest_mb: float) -> None:
    label = "time since the step began (ms, under the profiler)"
    memory_axes(axes, label, end_ms, highest_mb)


def _draw(axes: Axes, curve: MemoryCurve, colour: str) -> None:
    peak, boundary = curve.peak_bytes / MEGABYTE, curve.backward_at_s * 1e3
    look: dict[str, Any] = {"color": colour, "linewidth": 1.3}
    axes.step(
        curve.milliseconds,
        curve.megabytes,
        where="post",
        label=f"{curve.title}: {megabytes(peak)}",
        **look,
    )
    axes.plot([curve.peak_at_s * 1e3], [peak], "o", color=colour)
    axes.vlines(boundary, 0, curve.at(curve.backward_at_s) / MEGABYTE, linestyle=":", **look)


def _mark_backward(axes: Axes, curve: MemoryCurve) -> None:
    """A line where the backward begins, and a word on both sides of it."""
    boundary = curve.backward_at_s * 1e3
    axes.axvline(boundary, color=GREY, linestyle=":", linewidth=1.2)
    height = axes.get_ylim()[1] * 0.985  # just under the upper edge
    look: dict[str, Any] = {"color": GREY, "verticalalignment": "top", "fontsize": 9}
    axes.text(boundary, height, "forward  ", horizontalalignment="right", **look)
    axes.text(boundary, height, "  backward", horizontalalignment="left", **look)
