"""What a job takes, whether it fits, and what would make it fit: the function and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import ckpt_pass
from ckpt_pass import Device, Diagnosis, Job
from ckpt_pass.cli.commands import make_app
from ckpt_pass.cli.diagnosing import DOES_NOT_FIT
from tests.job.jobs import Blocks, job_peak

X = torch.randn(64, 32)
FACTORY = """
import torch
from tests.job.jobs import Blocks

def make():
    return Blocks(depth=1), torch.randn(64, 32)

def broken():
    raise LookupError("no weights here")

def wrong_shapes():
    return Blocks(depth=1), torch.randn(64, 31)

def frozen():
    return torch.nn.Linear(2, 2).requires_grad_(False), torch.ones(2)
"""


def found(model: nn.Module, x: torch.Tensor = X, **how: Any) -> Diagnosis:
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    return ckpt_pass.doctor(model, x, **{"optimizer": optimizer, "mode": "eager", **how})


def test_a_job_that_fits_as_it_is() -> None:
    model = Blocks()
    diagnosis = found(model, total="1MB")
    assert diagnosis.fits and diagnosis.plan is not None and not diagnosis.cures
    assert diagnosis.account == diagnosis.plan.account
    assert diagnosis.needed_bytes == diagnosis.plain_bytes == diagnosis.account.peak_bytes
    assert diagnosis.left_bytes == 10**6 - diagnosis.needed_bytes > 0
    assert diagnosis.recompute_share == 0.0
    first, second, *_ = str(diagnosis).splitlines()
    assert first.startswith("fits 1,000,000 bytes (976.6 KiB): ") and first.endswith("are left")
    assert second == "nothing that takes time is recomputed"
    assert "the job on cpu: SGD" in str(diagnosis) and "  budget       " in str(diagnosis)


def test_what_a_tight_total_costs_and_what_none_would() -> None:
    """The job without a plan takes what it says; with one no more than the total."""
    model = Blocks()
    plain = found(model, total="1MB").needed_bytes
    diagnosis = found(model, total=plain - 50_000)
    assert diagnosis.fits and diagnosis.plain_bytes == plain
    assert diagnosis.recompute_share is not None and diagnosis.recompute_share > 0
    assert "of the step's modelled time" in str(diagnosis)
    assert "with nothing recomputed it would need" in str(diagnosis)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    peak = job_peak(lambda: model(X), model, (X,), Job(optimizer))
    assert abs(peak - plain) <= 0.005 * plain


def test_what_would_make_it_fit() -> None:
    model, x = Blocks(depth=1), torch.randn(256, 32)
    least = found(model, x, total=1000)
    assert not least.fits and least.plan is None and least.plain_bytes is None
    assert least.left_bytes == 1000 - least.needed_bytes < 0
    diagnosis = found(model, x, total=least.needed_bytes - 5000)
    assert diagnosis.cures and all(c.needed_bytes <= diagnosis.total_bytes for c in diagnosis.cures)
    assert all(c.needed_bytes > diagnosis.total_bytes for c in diagnosis.short)
    text = str(diagnosis)
    assert text.startswith("does not fit ") and "are missing" in text
    for cure in diagnosis.cures:
        assert cure.words in text.partition("what would make it fit, each computed")[2]


def test_what_was_tried_and_is_not_enough() -> None:
    """Each of it with what the job needs then; the error of a plan names the nearest."""
    model = Blocks(depth=1)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    total = 70_000
    with pytest.raises(ckpt_pass.InfeasibleTotalError) as told:
        ckpt_pass.plan(model, X, total=total, optimizer=optimizer, mode="eager")
    error = told.value
    assert error.short and all(cure.needed_bytes > total for cure in error.short)
    nearest = min(error.short, key=lambda cure: cure.needed_bytes)
    assert not error.cures and f"{nearest} comes nearest" in str(error)
    diagnosis = Diagnosis(error.account.within(total), None, error.cures, error.short)
    *_, shown = str(diagnosis).partition("what is not enough alone\n")
    assert [line.split("  ")[1] for line in shown.splitlines()] == [c.words for c in error.short]


def test_a_total_below_the_parameters() -> None:
    diagnosis = found(Blocks(depth=1), total=1000)
    assert not diagnosis.fits and not diagnosis.cures
    assert "no plan of the step makes it fit" in str(diagnosis)
    assert "no change that was tried makes it fit alone" in str(diagnosis)


def test_a_total_that_the_card_does_not_have() -> None:
    small = Device("small", 10**6, (("float32", 1e13),), 1e12, 1e10)
    assert "WARNING" not in str(found(Blocks(depth=1), total="device", device=small))
    text = str(found(Blocks(depth=1), total="1MB", device=small))
    assert "the total is more than small (0 GB) has: 898.4 KiB" in text


class Cut(nn.Module):
    """Dynamo cuts its step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The mean square of what comes out."""
        x = self.first(x).relu()
        torch._dynamo.graph_break()
        return self.second(x).square().mean()


def test_a_step_of_several_graphs() -> None:
    """Its account is told once."""
    diagnosis = found(Cut(), total="1MB", mode="compiled")
    assert diagnosis.fits and diagnosis.plain_bytes == diagnosis.needed_bytes
    assert str(diagnosis).count("the job on cpu") == 1 and "dynamo cuts the step" in str(diagnosis)


def test_errors_are_those_of_a_plan() -> None:
    with pytest.raises(ckpt_pass.StepArgumentError, match="Did you mean 'mode'"):
        found(Blocks(depth=1), total="1MB", moed="eager")
    with pytest.raises(ckpt_pass.UnknownDeviceError, match="'h100'"):
        found(Blocks(depth=1), total="1MB", device="h10")
    with pytest.raises(ckpt_pass.InvalidTotalError, match=r"budget=0\.5"):
        found(Blocks(depth=1), total="1MB", budget=0.5)


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "factory.py"
    path.write_text(FACTORY)
    return str(path)


def ran(*words: str) -> Result:
    return CliRunner().invoke(make_app(), ["doctor", *words, "--eager"])


def test_the_command_of_a_job_that_fits(file: str, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    result = ran(f"{file}:make", "--total", "1MB", "--optimizer", "sgd", "--json", str(path))
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("fits 1,000,000 bytes") and f"wrote {path}" in result.stdout
    data = json.loads(path.read_text())
    assert data["fits"] and data["needed_bytes"] + data["left_bytes"] == data["total_bytes"]
    assert data["account"]["job"].startswith("SGD") and data["cures"] == data["short"] == []


def test_the_command_of_a_job_that_does_not_fit(file: str, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    result = ran(f"{file}:make", "--total", "100kB", "--json", str(path))
    assert result.exit_code == DOES_NOT_FIT == 3
    assert result.stdout.startswith("does not fit 100,000 bytes") and "AdamW" in result.stdout
    assert not json.loads(path.read_text())["fits"]


@pytest.mark.parametrize(
    ("name", "options", "code", "words"),
    [
        ("broken", "--total 1MB", 2, "no weights here"),
        ("mak", "--total 1MB", 2, "Did you mean 'make'"),
        ("wrong_shapes", "--total 1MB", 1, "try model(*args) first"),
        ("frozen", "--total 1MB", 1, "requires a gradient"),
        ("make", "--device h10", 1, "Did you mean 'h100'"),
        ("broken", "--device h10", 1, "Did you mean 'h100'"),  # said before the model is built
        ("broken", "--optimizer adamww", 1, "Did you mean 'AdamW'"),
        ("make", "--optimizer AdamW(lrr=1) --total 1MB", 1, "'lrr'"),
        ("broken", "--optimizer AdamW(1) --total 1MB", 1, "options are given by name"),
        ("broken", "--total 24Gb2", 1, "expected an amount"),
        ("broken", "--json nowhere/found.json", 2, "there is no folder 'nowhere'"),
        ("broken", "--json .", 2, "is a folder"),
    ],
)
def test_what_is_wrong_is_one_message(
    file: str, name: str, options: str, code: int, words: str
) -> None:
    result = ran(f"{file}:{name}", *options.split())
    assert result.exit_code == code and words in result.stderr, result.output
    assert "Traceback" not in result.output and isinstance(result.exception, SystemExit)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is one")
def test_no_total_and_no_device(file: str) -> None:
    result = ran(f"{file}:make")
    assert result.exit_code == 1 and "there is no accelerator here" in result.stderr
