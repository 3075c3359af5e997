"""The README is true: its code runs, and what it shows is what is printed."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ckpt_pass.cli.commands import make_app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
#: The start of the graph's fingerprint, which follows every change to graphs and their hashing.
FINGERPRINT = re.compile(r"\b[0-9a-f]{12}\b")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_code_runs_and_prints_what_is_shown() -> None:
    sources, shown = blocks("python"), blocks("text")
    assert sources and len(shown) == 1
    printed, names = io.StringIO(), {"__name__": "readme"}
    with contextlib.redirect_stdout(printed):
        for source in sources:
            exec(compile(source, "README.md", "exec"), names)
    expected = FINGERPRINT.sub("<graph>", shown[0].rstrip())
    assert FINGERPRINT.sub("<graph>", printed.getvalue().rstrip()) == expected


def test_the_first_code_is_six_lines() -> None:
    assert len([line for line in blocks("python")[0].splitlines() if line]) == 6


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).is_file()


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^    ckpt-pass (\S+)", README, re.M))))
def test_commands_exist(command: str) -> None:
    result = CliRunner().invoke(make_app(), [command, "--help"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("target", sorted(set(re.findall(r"^    make (\S+)", README, re.M))))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
