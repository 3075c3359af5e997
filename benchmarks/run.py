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
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # the model zoo lives among the tests
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402

import ckpt_pass  # noqa: E402
from benchmarks import (  # noqa: E402
    budget_times,
    budgets,
    deep,
    eager_budgets,
    eager_cost,
    gpu,
    gpu_offload,
    inductor,
    inductor_table,
    inductor_times,
    offload_clock,
    offload_planning,
    offload_ways,
    optimum,
    partition_cost,
    peaks,
    planning,
    published,
    sac_milp,
    strategies,
    tuning,
)
from benchmarks.common import Bar, BudgetRow, Result  # noqa: E402
from benchmarks.tables import table_of  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PIPED_WIDTH = 150  # characters: the widest table, that of the eager costs, fits
NAMES = (
    "eager",
    "eager-budgets",
    "partition",
    "peaks",
    "budgets",
    "inductor",
    "inductor-times",
    "offload",
    "offload-planning",
    "offload-ways",
    "planning",
    "deep",
    "published",
    "optimum",
    "strategies",
    "tuning",
)
#: Run where they are named alone: they need a GPU to say much, or packages that torch's tools want.
NAMED_ALONE = ("gpu", "gpu-offload", "sac-milp")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmarks named on the command line, all of them by default."""
    options = _parser().parse_args(arguments)
    # Written to a file or a pipe, tables keep a width that shows every column.
    console = Console() if sys.stdout.isatty() else Console(width=PIPED_WIDTH)
    for name in options.names or NAMES:
        for result in _results(name, options):
            show(result, console)
            for path in save(result, RESULTS) if options.save else ():
                console.print(f"saved as {path}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Benchmarks of ckpt_pass against torch itself.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join((*NAMES, *NAMED_ALONE))}"
    )
    parser.add_argument("--rounds", type=_at_least_one, help="timings of each variant")
    parser.add_argument("--save", action="store_true", help=f"write JSON to {RESULTS.name}/")
    parser.add_argument(
        "--all",
        action="store_true",
        help="budgets: every model; inductor: every model, in fp32 and bf16; planning: the "
        "longest chains",
    )
    parser.add_argument("--bf16", action="store_true", help="budgets, inductor: in bfloat16")
    parser.add_argument(
        "--solver", choices=("dp", "ilp"), default="dp", help="budgets: torch's own solver"
    )
    parser.add_argument("--times", action="store_true", help="budgets: time the steps, too")
    parser.add_argument("--layers", type=_at_least_one, help="deep: length of the chain")
    return parser


def _at_least_one(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"got {count}, expected 1 or more")
    return count


def _results(name: str, options: argparse.Namespace) -> Iterator[Result]:
    rounds: int | None = options.rounds
    if name == "eager":
        yield eager_cost.run(rounds or eager_cost.ROUNDS)
        yield eager_cost.run_larger(rounds or eager_cost.ROUNDS)
    elif name == "eager-budgets":
        large = () if not options.all else eager_budgets.LARGE
        yield eager_budgets.run((*eager_budgets.SMALL, *large))
    elif name == "partition":
        yield partition_cost.run(rounds or partition_cost.ROUNDS)
    elif name == "peaks":
        yield peaks.run()
    elif name == "budgets":
        models = budgets.MODELS if options.all else budgets.REFERENCES
        dtype = torch.bfloat16 if options.bf16 else torch.float32
        yield (found := budgets.run(models, dtype=dtype, solver=options.solver))
        if options.times:
            points = [row for row in found.rows if isinstance(row, BudgetRow)]
            yield budget_times.run(points, rounds or budget_times.ROUNDS)
    elif name == "offload":
        yield offload_clock.run(rounds=rounds or offload_clock.ROUNDS)
    elif name == "offload-planning":
        layers = (planning.DEEPEST,) if options.all else ()
        yield offload_planning.run(layers, rounds or offload_planning.ROUNDS)
    elif name == "offload-ways":
        yield offload_ways.run(rounds=rounds or offload_ways.ROUNDS)
    elif name == "inductor":
        if options.all:
            yield inductor_table.run(RESULTS / "inductor-rows.jsonl")
        else:
            yield inductor.run(dtype=torch.bfloat16 if options.bf16 else torch.float32)
    elif name == "inductor-times":
        dtype = torch.bfloat16 if options.bf16 else torch.float32
        models = inductor_table.ALL if options.all else inductor.SMALL
        yield inductor_times.run(models, dtype=dtype, rounds=rounds or inductor_times.ROUNDS)
    elif name == "published":
        yield published.run()
    elif name == "sac-milp":
        yield sac_milp.run()
    elif name == "gpu":
        yield gpu.run(rounds=rounds or gpu.ROUNDS)
    elif name == "gpu-offload":
        yield gpu_offload.run(rounds=rounds or gpu_offload.ROUNDS)
    elif name == "planning":
        layers = planning.ALL_LAYERS if options.all else planning.LAYERS
        yield planning.run(layers, rounds or planning.ROUNDS)
    elif name == "optimum":
        yield optimum.run(budgets.MODELS if options.all else optimum.SMALL_MODELS)
    elif name == "deep":
        yield deep.run(options.layers or deep.LAYERS)
    elif name == "strategies":
        yield from strategies.run(rounds or strategies.ROUNDS)
    elif name == "tuning":
        yield tuning.run(rounds=rounds or tuning.ROUNDS)
    else:
        raise SystemExit(
            f"There is no benchmark {name!r}; there are {', '.join((*NAMES, *NAMED_ALONE))}."
        )


def show(result: Result, console: Console) -> None:
    """Print a result: its table, then its bars."""
    console.print(table_of(result))
    for bar in result.bars:
        console.print(_bar_line(bar))
    console.print()


def _bar_line(bar: Bar) -> str:
    verdict = "[green]met[/]" if bar.met else "[red]missed[/]"
    if bar.unit:
        numbers = f"{bar.value:,.0f} <= {bar.limit:,.0f} {bar.unit}"
    else:
        numbers = f"{bar.value:.3f} <= {bar.limit:.2f}"
    return f"  {verdict}  {bar.what}: {numbers}"


def save(result: Result, folder: Path) -> list[Path]:
    """Write a result, and what it was measured on, as JSON; a picture too, where it has one."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    data = {**dataclasses.asdict(result), "date": today, "measured_on": environment()}
    for shown, bar in zip(data["bars"], result.bars, strict=True):
        shown["met"] = bar.met
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.name}-{today}.json"
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if result.name != "planning":
        return [path]
    return [path, planning.plot(result, folder / "planning.png")]


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
