"""Try families in six ways; print a line of JSON for each, or write the page of all."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from tests.zoo.families import images
from tests.zoo.families.catalogue import FAMILIES
from tests.zoo.families.children import missing, tried
from tests.zoo.families.page import as_line, page, read
from tests.zoo.families.ways import WAYS, Trial


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.families")
    parser.add_argument("family", nargs="?", choices=list(FAMILIES), help="the one to try")
    parser.add_argument("--way", choices=list(WAYS), action="append", help="instead of all six")
    parser.add_argument("--page", type=Path, help="try all families, write this page")
    parser.add_argument("--results", type=Path, help="lines of before, for --page: not run again")
    options = parser.parse_args()
    if options.page is not None:
        _write(options.page, options.results)
    elif options.family is not None:
        _try(options.family, options.way or list(WAYS))
    else:
        parser.error("expected a family, or --page FILE")


def _try(name: str, names: list[str]) -> None:
    images.torchvision_importable()
    torch.set_num_threads(1)
    trial = Trial(FAMILIES[name])
    for way in names:
        print(as_line(trial.run(way)), flush=True)


def _write(path: Path, results: Path | None) -> None:
    found = read(results.read_text().splitlines()) if results is not None else []
    known = {outcome.family for outcome in found}
    for family in FAMILIES.values():
        if family.name not in known and results is None and not missing(family):
            found += tried(family)
            print(f"{family}: {', '.join(o.verdict for o in found[-6:])}", file=sys.stderr)
    version = torch.__version__.partition("+")[0]
    path.write_text(page(found, FAMILIES.values(), version))


if __name__ == "__main__":
    main()
