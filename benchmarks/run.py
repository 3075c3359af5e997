"""Run the benchmarks, print their tables: ``benchmarks/run.py [NAME ...] [--rounds N] [--save]``.

Timings come with their quartiles: read them before the median. Peaks are exact.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # the model zoo lives among the tests
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

import ckpt_pass  # noqa: E402
from benchmarks import budgets, eager_cost, partition_cost, peaks  # noqa: E402
from benchmarks.common import Bar, BudgetRow, PeakRow, Result, TimingRow  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PIPED_WIDTH = 150  # characters: the widest table, that of the eager costs, fits
NAMES = ("eager", "partition", "peaks", "budgets")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmarks named on the command line, all of them by default."""
    options = _parser().parse_args(arguments)
    # Written to a file or a pipe, tables keep a width that shows every column.
    console = Console() if sys.stdout.isatty() else Console(width=PIPED_WIDTH)
    for name in options.names or NAMES:
        result = _runner(name, options.rounds)()
        show(result, console)
        if options.save:
            console.print(f"saved as {save(result, RESULTS)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Benchmarks of ckpt_pass against torch itself.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--rounds", type=_at_least_one, help="timings of each variant")
    parser.add_argument("--save", action="store_true", help=f"write JSON to {RESULTS.name}/")
    return parser


def _at_least_one(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"got {count} rounds, expected 1 or more")
    return count


def _runner(name: str, rounds: int | None) -> Callable[[], Result]:
    if name == "eager":
        return lambda: eager_cost.run(rounds or eager_cost.ROUNDS)
    if name == "partition":
        return lambda: partition_cost.run(rounds or partition_cost.ROUNDS)
    return budgets.run if name == "budgets" else peaks.run


def show(result: Result, console: Console) -> None:
    """Print a result: its table, then its bars."""
    console.print(_table(result))
    for bar in result.bars:
        console.print(_bar_line(bar))
    console.print()


def _table(result: Result) -> Table:
    budgeted = [row for row in result.rows if isinstance(row, BudgetRow)]
    if budgeted:
        return _budget_table(result.title, budgeted)
    timings = [row for row in result.rows if isinstance(row, TimingRow)]
    found = [row for row in result.rows if isinstance(row, PeakRow)]
    return _timing_table(result.title, timings) if timings else _peak_table(result.title, found)


def _timing_table(title: str, rows: Sequence[TimingRow]) -> Table:
    references = tuple(rows[0].ratios)
    table = Table(title=f"{title}; {rows[0].rounds} rounds")
    table.add_column("variant")
    for column in ("median CPU ms", "quartiles", "least", *(f"/ {r}" for r in references)):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.variant,
            f"{row.median_s * 1e3:.2f}",
            f"{row.lower_quartile_s * 1e3:.2f} .. {row.upper_quartile_s * 1e3:.2f}",
            f"{row.least_s * 1e3:.2f}",
            *(f"{row.ratios[name]:.2f}" for name in references),
        )
    return table


def _peak_table(title: str, rows: Sequence[PeakRow]) -> Table:
    table = Table(title=title)
    table.add_column("model")
    table.add_column("variant")
    for column in ("peak bytes", "saved bytes", "Gflop"):
        table.add_column(column, justify="right")
    for row in rows:
        flops = f"{row.flops / 1e9:.2f}"
        table.add_row(row.model, row.variant, f"{row.peak_bytes:,}", f"{row.saved_bytes:,}", flops)
    return table


def _budget_table(title: str, rows: Sequence[BudgetRow]) -> Table:
    table = Table(title=title)
    table.add_column("model")
    for column in ("torch budget", "torch MB", "recompute", "ours MB", "recompute", "ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        theirs, ours = (
            f"{100 * (flops - row.plain_flops) / row.plain_flops:.1f} %"
            for flops in (row.torch_flops, row.ours_flops)
        )
        table.add_row(
            row.model,
            f"{row.torch_budget:g}",
            f"{row.torch_peak_bytes / 1e6:.1f}",
            theirs,
            f"{row.ours_peak_bytes / 1e6:.1f}",
            ours,
            f"{row.ratio:.2f}",
        )
    return table


def _bar_line(bar: Bar) -> str:
    verdict = "[green]met[/]" if bar.met else "[red]missed[/]"
    if bar.unit:
        numbers = f"{bar.value:,.0f} <= {bar.limit:,.0f} {bar.unit}"
    else:
        numbers = f"{bar.value:.3f} <= {bar.limit:.2f}"
    return f"  {verdict}  {bar.what}: {numbers}"


def save(result: Result, folder: Path) -> Path:
    """Write a result, and what it was measured on, as JSON; return the file."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    data = {**dataclasses.asdict(result), "date": today, "measured_on": environment()}
    for shown, bar in zip(data["bars"], result.bars, strict=True):
        shown["met"] = bar.met
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.name}-{today}.json"
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


def environment() -> dict[str, object]:
    """The versions and the machine that a figure belongs to."""
    return {
        "ckpt_pass": ckpt_pass.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
    }


if __name__ == "__main__":
    main()
