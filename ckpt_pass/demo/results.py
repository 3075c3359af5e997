"""What the demo prints and draws of its runs, and what it checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_pass._errors import CkptPassError
from ckpt_pass.demo.variants import PLAIN, Variant
from ckpt_pass.drawing.memory import MEGABYTE, MemoryCurve, plot_comparison, plot_memory
from ckpt_pass.measure.step import Measurement

if TYPE_CHECKING:
    from rich.table import Table

#: Runs whose fastest is the time of a step: other programs only ever make a run slower.
ROUNDS = 5
#: How far apart losses may be where the compiler fuses kernels, and so rounds otherwise: relative.
#: Float32 has 1.2e-7; the steps of training amplify it.
FUSED_TOLERANCE = 1e-4


class LossDiffersError(CkptPassError):
    """A variant of the demo ended with another loss than the plain run of its kind."""


@dataclass(frozen=True)
class Result:
    """What one variant came to.

    ``loss`` is that of the last training step, in nats, ``time_s`` the fastest of ``ROUNDS`` steps.
    """

    variant: Variant
    loss: float
    measured: Measurement
    curve: MemoryCurve
    time_s: float


def plain_of(results: Sequence[Result], kind: str) -> Result:
    """The plain run of a kind, which the others of that kind are compared with."""
    return next(r for r in results if r.variant.kind == kind and r.variant.name == PLAIN)


def is_same_loss(result: Result, plain: Result) -> bool:
    """Bit by bit; where Inductor fuses kernels, within ``FUSED_TOLERANCE``."""
    tolerance = FUSED_TOLERANCE if "inductor" in result.variant.kind else 0.0
    return abs(result.loss - plain.loss) <= tolerance * abs(plain.loss)


def check_losses(results: Sequence[Result]) -> None:
    """Compare every loss with that of the plain run of its kind.

    Raises:
        LossDiffersError: one differs.
    """
    for result in results:
        plain = plain_of(results, result.variant.kind)
        if not is_same_loss(result, plain):
            raise LossDiffersError(
                f"{result.variant.title} ended with loss {result.loss!r}, expected "
                f"{plain.loss!r} as in {plain.variant.title}. Recomputation must not change what "
                "is computed: compare_gradients shows which gradient differs first."
            )


def result_table(results: Sequence[Result]) -> Table:
    """The table: bytes, flops and time of a step, against the plain run of the same kind."""
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        caption=f"x: ratio to plain of the same kind; ms: fastest of {ROUNDS}; a budget is a share "
        "of the peak of the step that recomputes nothing, torch's own one of what that saves",
    )
    table.add_column("variant", no_wrap=True)
    for name in ("peak MB", "x", "saved MB", "Gflop", "ms", "x", "loss"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("against plain", no_wrap=True)
    kind = ""
    for result in results:
        if result.variant.kind != kind:
            kind = result.variant.kind
            table.add_section()
            table.add_row(kind, style="bold")
        table.add_row(*_cells(result, plain_of(results, kind)))
    return table


def _cells(result: Result, plain: Result) -> tuple[str, ...]:
    measured, base = result.measured, plain.measured
    return (
        f"  {result.variant.name}",
        f"{measured.peak_bytes / MEGABYTE:.1f}",
        f"{measured.peak_bytes / base.peak_bytes:.2f}",
        "" if measured.saved_bytes is None else f"{measured.saved_bytes / MEGABYTE:.1f}",
        f"{measured.flops / 1e9:.1f}",
        f"{result.time_s * 1e3:.0f}",
        f"{result.time_s / plain.time_s:.2f}",
        f"{result.loss:.6f}",
        _agreement(result, plain),
    )


def _agreement(result: Result, plain: Result) -> str:
    if result is plain:
        return ""
    if result.loss == plain.loss:
        return "bitwise the same"
    apart = abs(result.loss - plain.loss) / abs(plain.loss)
    if is_same_loss(result, plain):
        return f"within {FUSED_TOLERANCE:.0e} ({apart:.0e})"
    return f"DIFFERS ({apart:.0e})"


def plot(results: Sequence[Result], folder: Path) -> list[Path]:
    """One PNG a variant and one of all; return their paths."""
    paths = []
    panels: dict[str, list[MemoryCurve]] = {}
    for result in results:
        curve = result.curve
        name = f"{result.variant.kind.partition(' ')[0]}-{result.variant.name.replace(' ', '-')}"
        paths.append(plot_memory(curve, folder / f"{name}.png"))
        panels.setdefault(result.variant.kind, []).append(
            MemoryCurve(result.variant.name, curve.timeline, curve.peak_bytes, curve.backward_at_s)
        )
    title = "Memory over one training step (dot: peak; dotted line: the backward begins)"
    paths.append(plot_comparison(title, panels, folder / "all.png"))
    return paths
