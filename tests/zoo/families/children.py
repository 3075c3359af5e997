"""Families tried in processes of their own: none takes another one down."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.zoo.families import Family, ways
from tests.zoo.families.page import read

ROOT = Path(__file__).parents[3]
LIMIT_S = 600.0
"""For all ways of one family."""


def missing(family: Family) -> str:
    """The package that a family needs and that is not there, if any."""
    there = importlib.util.find_spec(family.library) is not None
    return "" if there else family.library


def tried(
    family: Family, names: Sequence[str] = tuple(ways.WAYS), limit_s: float = LIMIT_S
) -> list[ways.Outcome]:
    """What came of a family; a way in which the process died is a crash."""
    asked = [option for name in names for option in ("--way", name)]
    command = [sys.executable, "-m", "tests.zoo.families", family.name, *asked]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = child.communicate(timeout=limit_s)
        ended = f"ended with {child.returncode}: {' '.join(err.split())[-300:]}"
    except subprocess.TimeoutExpired:
        child.kill()
        out, _ = child.communicate()
        ended = f"not done after {limit_s:.0f} s"
    found = read(line for line in out.splitlines() if line.startswith("{"))
    left = names[len(found) :]
    return found + [ways.Outcome(family.name, way, ways.CRASH, ended) for way in left[:1]]
