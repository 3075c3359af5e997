"""The commands are told of a whole job."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import ckpt_pass
from ckpt_pass.cli.commands import make_app
from tests.job.jobs import Blocks

FACTORY = """
import torch
from tests.job.jobs import Blocks

def make():
    return Blocks(depth=1), torch.randn(64, 32)
"""


@pytest.fixture
def target(tmp_path: Path) -> str:
    path = tmp_path / "factory.py"
    path.write_text(FACTORY)
    return f"{path}:make"


def ran(*words: str) -> Result:
    return CliRunner().invoke(make_app(), list(words))


def test_a_plan_for_a_total(target: str) -> None:
    found = ran("plan", target, "--total", "1MB", "--optimizer", "SGD(momentum=0.9)", "--eager")
    assert found.exit_code == 0, found.output
    assert "the job on cpu: SGD" in found.output and "are left" in found.output


def test_a_plan_on_paper_for_all_that_the_card_has(target: str) -> None:
    found = ran(
        "plan", target, "--device", "l4", "--total", "device", "--accumulate", "2", "--eager"
    )
    assert found.exit_code == 0, found.output
    assert "l4 (24 GB), on paper: AdamW, 2 microbatches" in found.output


def test_what_does_not_go_is_one_message(target: str) -> None:
    for words, told in (
        (("--device", "l5"), "Did you mean 'l4"),
        (("--optimizer", "Adamm"), "Did you mean 'Adam'"),
        (("--total", "1kB", "--eager"), "does not fit 1,000 bytes"),
    ):
        found = ran("plan", target, *words)
        assert found.exit_code == 1 and told in found.output


def test_saved_activations_of_a_step_within_a_total() -> None:
    model = Blocks(depth=1)
    optimizer = torch.optim.SGD(model.parameters())
    found = ckpt_pass.saved_activations(
        model, torch.randn(64, 32), total="1MB", optimizer=optimizer
    )
    assert found.saved_bytes
