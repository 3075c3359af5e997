"""The account of a job as a picture: a bar for each part of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_pass.drawing.figures import COLOURS, GREY, MEGABYTE, figure_of, open_frame, write

if TYPE_CHECKING:
    from ckpt_pass.plans.account import Account, JobPhase

_STEP, _OUTPUTS = "added while it runs", "outputs"
_COLOUR_OF = {
    "parameters": COLOURS[1],
    "buffers": COLOURS[0],
    "inputs": COLOURS[4],
    "optimizer states": COLOURS[3],
    "gradients": COLOURS[5],
    _OUTPUTS: GREY,
    _STEP: "#9ecae9",
}


def plot_account(account: Account, path: Path) -> Path:
    """Draw what is there in each part of a job as a PNG; return its path.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = figure_of(width=9.0, height=1.6 + 0.55 * len(account.phases))
    axes = figure.add_subplot()
    figure.suptitle(f"memory of a training job on {account.device}")
    axes.set_title(account.job, fontsize=9)
    named = set[str]()
    for row, phase in enumerate(account.phases):
        left = 0.0
        for name, nbytes in _parts(account, phase):
            label = None if name in named else name
            named.add(name)
            width = nbytes / MEGABYTE
            axes.barh(row, width, left=left, color=_COLOUR_OF[name], label=label, height=0.7)
            left += width
        axes.text(left, row, f" {left:,.1f} MB", va="center", fontsize=9)
    highest = max(account.peak_bytes, account.total_bytes or 0) / MEGABYTE
    if account.total_bytes is not None:
        total = account.total_bytes / MEGABYTE
        label = f"total: {total:,.1f} MB"
        axes.axvline(total, color=COLOURS[2], linestyle="--", linewidth=1.2, label=label)
    axes.set_yticks(range(len(account.phases)), [phase.name for phase in account.phases])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * highest or 1.0)
    axes.set_xlabel("memory (MB)")
    axes.grid(axis="x", color=GREY, alpha=0.2)
    open_frame(axes)
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.2), ncols=4, frameon=False, fontsize=9)
    return write(figure, path)


def _parts(account: Account, phase: JobPhase) -> list[tuple[str, int]]:
    """What a part of a job has there, in the order of its bar."""
    rows = dict(account.rows())
    held = {name: rows.get(name, 0) for name in ("parameters", "buffers", "inputs")}
    rest = phase.standing_bytes - sum(held.values())
    gradients = account.gradients_bytes
    outputs = 0 if phase.name.startswith("first forward") else account.outputs_bytes
    standing = gradients if rest - outputs >= gradients and not _alone(account, phase) else 0
    held |= {"optimizer states": rest - standing - outputs, "gradients": standing}
    held |= {_OUTPUTS: outputs, _STEP: phase.above_bytes or 0}
    return [(name, nbytes) for name, nbytes in held.items() if nbytes]


def _alone(account: Account, phase: JobPhase) -> bool:
    """Whether a forward begins without gradients."""
    return phase.is_pass and not account.keeps_gradients
