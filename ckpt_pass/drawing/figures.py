"""What every picture shares: colours, a figure without a window system, words at points."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_pass._errors import CkptPassError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEGABYTE = 1e6
#: From the palette of Okabe and Ito, which people with any colour vision tell apart.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
GREY = "#666666"
DOTS_PER_INCH = 120
#: Room above the highest point, as a share of it, for the words that name it.
HEADROOM = 1.18


class MissingExtraError(CkptPassError):
    """A package that belongs to an optional extra is not installed."""

    def __init__(self, package: str | None, extra: str) -> None:
        super().__init__(
            f"{package} is not installed; the extra {extra!r} of ckpt_pass brings it. "
            f"Expected it to be importable. Install it with: pip install 'ckpt_pass[{extra}]'"
        )


@contextlib.contextmanager
def missing_extra(extra: str) -> Iterator[None]:
    """Say which extra to install when an import in the ``with`` block fails.

    Raises:
        MissingExtraError: a module is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name, extra) from error


def figure_of(width: float, height: float) -> Figure:
    """A figure without a window system: it draws itself, whatever backend is set elsewhere.

    Args:
        width, height: in inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with missing_extra("plot"):
        from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def write(figure: Figure, path: Path) -> Path:
    """Write a figure as a PNG of 256 colours, which makes it small; return its path."""
    with missing_extra("plot"):
        from PIL import Image
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DOTS_PER_INCH, format="png")
    with Image.open(drawn) as picture:
        few = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        few.save(path, format="png", optimize=True)
    return path


def open_frame(axes: Axes) -> None:
    """Leave away the frame's upper and right side."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def megabytes(amount: float) -> str:
    """An amount in words; three digits of a small one."""
    return f"{amount:,.1f} MB" if amount >= 10 else f"{amount:.3g} MB"


def memory_axes(axes: Axes, time_label: str, end_ms: float, highest_mb: float) -> None:
    """Axes of memory over time, with room for words above the highest point."""
    axes.set_xlabel(time_label)
    axes.set_ylabel("memory above the start (MB)")
    axes.set_xlim(0, end_ms)
    axes.set_ylim(0, highest_mb * HEADROOM)
    axes.grid(axis="y", color=GREY, alpha=0.2)
    open_frame(axes)


def label_peak(axes: Axes, at_ms: float, highest_mb: float, colour: str) -> None:
    """A dot at a peak, and its size on the side where there is more room."""
    axes.plot([at_ms], [highest_mb], "o", color=colour)
    left = at_ms > sum(axes.get_xlim()) / 2
    look: dict[str, Any] = {"color": colour, "fontweight": "bold"}
    axes.annotate(
        f"peak {megabytes(highest_mb)}",
        (at_ms, highest_mb),
        xytext=(-8 if left else 8, 4),
        textcoords="offset points",
        horizontalalignment="right" if left else "left",
        **look,
    )
