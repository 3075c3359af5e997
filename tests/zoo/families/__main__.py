"""Try families in six ways; print a line of JSON for each."""

from __future__ import annotations

import argparse
import json
import sys

import torch

from tests.zoo.families import images
from tests.zoo.families.catalogue import FAMILIES
from tests.zoo.families.ways import WAYS, Trial


def main() -> None:
    """Run the families and ways that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.families")
    parser.add_argument("family", choices=list(FAMILIES), help="the family to try")
    parser.add_argument("--way", choices=list(WAYS), action="append", help="instead of all")
    options = parser.parse_args()
    images.torchvision_importable()
    torch.set_num_threads(1)
    trial = Trial(FAMILIES[options.family])
    for way in options.way or WAYS:
        print(json.dumps(trial.run(way).as_dict()), flush=True)


if __name__ == "__main__":
    sys.exit(main())
