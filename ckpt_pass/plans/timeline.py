"""Memory over a step as a value, and as a small plot made of characters.

Moments are modelled times: a recomputed matmul takes room in the picture, a view takes none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from ckpt_pass.planner.clock import Times
from ckpt_pass.planner.liveness import MemoryProfile, ScheduleBytes
from ckpt_pass.planner.problem import Problem

MEBIBYTE = 1024.0**2
#: A cell filled from below in eighths; the first one is empty.
_FILLED = " ▁▂▃▄▅▆▇█"
_EIGHTHS = len(_FILLED) - 1
#: A budget further above the peak than this would press the curve flat: it is told in words.
_FAR_ABOVE = 1.5


@dataclass(frozen=True)
class Timeline(ScheduleBytes):
    """The curve of a step over its modelled time.

    Attributes:
        seconds_of: modelled seconds that each op takes; 0 for views. Where values are moved, from
            its beginning to that of the next, with what is waited for copies.
    """

    seconds_of: tuple[float, ...]

    @property
    def begins_s(self) -> tuple[float, ...]:
        """The moment at which each op begins, and last the moment at which the step ends."""
        found = [0.0]
        for seconds in self.seconds_of:
            found.append(found[-1] + seconds)
        return tuple(found)

    @property
    def duration_s(self) -> float:
        """Modelled seconds of the whole step."""
        return self.begins_s[-1]

    @property
    def backward_at_s(self) -> float:
        """The moment at which the backward begins."""
        return self.begins_s[self.forward_length]

    @property
    def peak_at_s(self) -> float:
        """The moment at which the peak is first reached."""
        return self.begins_s[self.peak_index]

    def columns(self, width: int) -> list[int]:
        """The most bytes in each of ``width`` equal parts of the step's time.

        An op counts in every part that it reaches into, and one without time in the part in
        which it stands, so that no peak falls between two parts.
        """
        found = [0] * width
        whole = self.duration_s or 1.0
        places = [moment / whole * width for moment in self.begins_s]
        for index, nbytes in enumerate(self.bytes_at):
            first = min(int(places[index]), width - 1)
            for column in range(first, max(first + 1, min(ceil(places[index + 1]), width))):
                found[column] = max(found[column], nbytes)
        return found


def timeline_of(problem: Problem, profile: MemoryProfile, times: Times | None = None) -> Timeline:
    """A simulated step over its modelled time; by the clock, where copies are waited for."""
    if times is not None:
        ends = (*times.starts_s[1:], times.step_time_s)
        pairs = zip(times.starts_s, ends, strict=True)
        seconds = tuple(max(end - start, 0.0) for start, end in pairs)  # sums are rounded
    else:
        seconds = tuple(problem.ops[index].time_s for index in profile.schedule)
    return Timeline(profile.bytes_at, profile.forward_length, seconds)


def text_plot(
    timeline: Timeline, budget_bytes: int | None = None, *, width: int = 60, height: int = 8
) -> list[str]:
    """Memory over the step's modelled time as lines of block characters.

    Args:
        timeline: what to draw.
        budget_bytes: drawn as a dashed line, if any and if it is near.
        width, height: of the plotted area, in characters.

    Returns:
        ``height + 3`` lines: where the peak is, the area with the upper edge of each row in MiB,
        and an axis that says where the forward ends and the backward begins. Empty for a step
        without ops.
    """
    if not timeline.peak_bytes or not timeline.duration_s:
        return []
    peak = timeline.peak_bytes
    near = budget_bytes is not None and budget_bytes <= _FAR_ABOVE * peak
    top = max(peak, budget_bytes if near and budget_bytes is not None else 0)
    columns = timeline.columns(width)
    at_peak = columns.index(peak)
    border = min(int(timeline.backward_at_s / timeline.duration_s * width), width - 1)
    line = _row_of(budget_bytes, top, height) if near and budget_bytes is not None else None
    lines = [_peak_line(at_peak, peak, width)]
    for row in reversed(range(height)):
        cells = [_cell(nbytes, top, row, height) for nbytes in columns]
        if row == line:
            cells = ["╌" if cell == " " else cell for cell in cells]
        if cells[border] in " ╌":
            cells[border] = "┊"
        tail = f" budget {_mebibytes(budget_bytes)} MiB" if row == line and budget_bytes else ""
        lines.append(f"{_mebibytes(top * (row + 1) // height):8} ┤{''.join(cells)}{tail}".rstrip())
    return [*lines, *_axis(border, width)]


def _mebibytes(nbytes: int | None) -> str:
    return f"{(nbytes or 0) / MEBIBYTE:,.1f}"


def _row_of(nbytes: int, top: int, height: int) -> int:
    """The row, counted from below, that a level falls into."""
    return max(-(-nbytes * height // top) - 1, 0)


def _cell(nbytes: int, top: int, row: int, height: int) -> str:
    """One character of a bar; what is there at all shows at least an eighth."""
    eighths = -(-nbytes * height * _EIGHTHS // top)  # up, so that the peak reaches its own line
    return _FILLED[max(0, min(eighths - row * _EIGHTHS, _EIGHTHS))]


def _peak_line(at_peak: int, peak: int, width: int) -> str:
    words = f"peak {_mebibytes(peak)} MiB"
    left = at_peak >= len(words) + 1
    text = f"{words} ▼".rjust(at_peak + 1) if left else " " * at_peak + f"▼ {words}"
    return " " * 10 + text


def _axis(border: int, width: int) -> Iterator[str]:
    line = ["─"] * width
    line[border] = "┴"
    yield f"{'MiB':8} └{''.join(line)}"
    room = [" "] * width
    _write(room, "forward", border - len("forward") - 1, border)
    _write(room, "backward", border + 1, width)
    yield " " * 10 + "".join(room).rstrip()


def _write(room: list[str], word: str, start: int, end: int) -> None:
    """Put a word into a line, or not at all where it has no room."""
    if start >= 0 and start + len(word) <= end:
        room[start : start + len(word)] = word
