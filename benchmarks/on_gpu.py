"""Everything that needs a GPU, in one command: ``make gpu``.

The tests marked ``gpu``, then the table of :mod:`benchmarks.gpu_headline`, within nine minutes.
Results are written beside the others under the device's name: as JSON, and the table as a text.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402

from benchmarks import gpu_headline  # noqa: E402
from benchmarks.common import Result  # noqa: E402
from benchmarks.run import PIPED_WIDTH, RESULTS, save, show  # noqa: E402

#: Seconds: of the whole command, and of its tests at the most.
LIMIT_S, TESTS_S = 530.0, 180.0
#: Left for what runs last and for writing the results.
_RESERVE_S = 20.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tests and the table; return 0, 1 where tests fail, or 2 where there is no GPU."""
    options = _parser().parse_args(arguments)
    began = time.perf_counter()
    if not options.dry_run and not torch.cuda.is_available():
        print(_no_gpu(), file=sys.stderr)
        return 2
    tests = "" if options.no_tests else run_tests(options.dry_run)
    left_s = options.limit_s - _RESERVE_S - (time.perf_counter() - began)
    if options.dry_run:
        result = gpu_headline.run(
            device="cpu", rounds=1, inners=("aot_eager",), limit_s=left_s, brief=True
        )
    else:
        result = gpu_headline.run(limit_s=left_s)
    result = replace(result, facts={**result.facts, "tests": tests})
    show(result, Console() if sys.stdout.isatty() else Console(width=PIPED_WIDTH))
    for path in write(result, options.out):
        print(f"saved as {path}")
    print(f"tests: {tests or 'not run'}; {time.perf_counter() - began:.0f} s in all")
    return 1 if "failed" in tests or "error" in tests else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="The tests and the table that need a GPU.")
    parser.add_argument(
        "--dry-run", action="store_true", help="the same way on the CPU, with a tiny model"
    )
    parser.add_argument("--no-tests", action="store_true", help="the table alone")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="seconds for all of it")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser


def _no_gpu() -> str:
    built = torch.version.cuda or torch.version.hip
    why = f"built for {built}, sees none" if built else "is built for the CPU alone"
    return (
        f"make gpu needs a GPU, but torch {torch.__version__} {why}. Expected an NVIDIA card, its "
        "driver, and torch 2.11 or newer with CUDA. To take the same way on the CPU with a tiny "
        "model: make gpu GPU_ARGS=--dry-run"
    )


def run_tests(dry_run: bool) -> str:
    """Run the tests marked ``gpu``, or only collect them; return pytest's last line."""
    marked = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if _is_marked(path)]
    names = [str(path.relative_to(ROOT)) for path in marked]
    options = ["--collect-only"] if dry_run else ["-rf"]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, *options, *names],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            timeout=TESTS_S,
        )
    except subprocess.TimeoutExpired:
        return f"1 failed: not done in {TESTS_S:.0f} s"
    print(done.stdout)
    lines = [line.strip("= ") for line in done.stdout.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    return last if done.returncode == 0 or "failed" in last else f"{last} (error)"


def _is_marked(path: Path) -> bool:
    return "mark.gpu" in path.read_text(encoding="utf-8")


def write(result: Result, folder: Path) -> list[Path]:
    """Write a result under its device's name: JSON, and the table as a text; return the paths."""
    device = re.sub(r"[^a-z0-9]+", "-", str(result.facts["device"]).lower()).strip("-")
    named = replace(result, name=f"{result.name}-{device}")
    paths = save(named, folder)
    text = paths[0].with_suffix(".txt")
    with text.open("w", encoding="utf-8") as file:
        show(named, Console(file=file, width=PIPED_WIDTH, no_color=True))
        left_out = result.facts["left_out"]
        assert isinstance(left_out, list)
        for words in left_out:
            file.write(f"left out: {words}\n")
        file.write(f"tests: {result.facts['tests'] or 'not run'}; torch {torch.__version__}\n")
    return [*paths, text]


if __name__ == "__main__":
    sys.exit(main())
