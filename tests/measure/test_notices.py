"""The profiler's notices stay off the terminal; nothing else does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ckpt_pass.measure.notices import without_notices

SCRIPT = """
import os, sys, torch
import ckpt_pass
x = torch.ones(8, 8, requires_grad=True)
def step():
    os.write(2, b"from the step\\n")
    return x.square().sum()
ckpt_pass.measure_step(step, repeats=1)
"""


def standard_error(**environment: str) -> str:
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    return found.stderr


def test_a_measured_step_prints_no_line_of_the_profilers() -> None:
    # On this level the profiler's library also says in which stage it is.
    said = standard_error(KINETO_LOG_LEVEL="3")
    assert "profiler_start" not in said and "profiler_stop" not in said
    assert "Completed Stage: Collection" in said
    assert "from the step" in said


def test_all_but_the_notices_is_handed_on_in_order(capfd: pytest.CaptureFixture[str]) -> None:
    notice = b"USDT:2026-01-01 00:00:00 1:1 Handler.cpp:52] profiler_start\n"
    os.write(2, b"before\n")
    with without_notices():
        os.write(2, b"one\n" + notice + b"two: USDT: is a word\n")
        os.write(2, b"three\n")
        os.write(2, notice.replace(b"_start", b"_stop"))
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "before\none\ntwo: USDT: is a word\nthree\nafter\n"


def test_an_error_inside_is_handed_on(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), without_notices():
        os.write(2, b"said\n")
        raise KeyError
    assert capfd.readouterr().err == "said\n"
