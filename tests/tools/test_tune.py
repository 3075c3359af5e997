"""The fastest way to run a job within a total: what is chosen, what is run, what is left alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from typer.testing import CliRunner

import ckpt_pass
from ckpt_pass import InfeasibleTotalError, Job, Tuned, tune
from ckpt_pass.cli.commands import make_app
from ckpt_pass.errors import (
    ForeignOptimizerError,
    InvalidTotalError,
    PlanModeError,
    StepArgumentError,
    TuneArgumentError,
)
from ckpt_pass.job.jobs import Job as AnyJob
from ckpt_pass.plans.account import Account
from ckpt_pass.tools.candidates import Planned, microbatches_of
from ckpt_pass.tools.timed_steps import Stopwatch
from tests.job.jobs import Blocks

#: Of the microbatches of eight samples one of four recomputes, and that of eight does not fit.
TOTAL = "720 kB"


def batch(count: int) -> Tensor:
    return torch.randn(32 * count, 32)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), momentum=0.9)


def tuned(model: nn.Module | None = None, **how: Any) -> Tuned:
    model = Blocks(depth=3) if model is None else model
    given: dict[str, Any] = {"total": TOTAL, "optimizer": sgd(model), "global_batch": 8}
    given |= {"mode": "eager", "rounds": 1}
    return tune(model, how.pop("make_batch", batch), **{**given, **how})


@pytest.fixture(scope="module")
def curve() -> Tuned:
    """Predicted alone, with values that may move."""
    return tuned(measure=0, offload=True)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What was run, each candidate once."""
    runs: list[tuple[str, int]] = []
    real: Callable[..., float | None] = Stopwatch.pass_s

    def pass_s(self: Stopwatch, candidate: Planned) -> float | None:
        runs.append((candidate.way.mode, candidate.microbatch))
        return real(self, candidate)

    monkeypatch.setattr(Stopwatch, "pass_s", pass_s)
    return runs


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> dict[int, float | None]:
    """Seconds of a forward and backward by microbatch, in the place of real ones.

    The modelled ones are as many as there are samples.
    """
    given: dict[int, float | None] = {}

    def pass_s(self: Stopwatch, candidate: Planned) -> float | None:
        return given[candidate.microbatch]

    def in_turn(self: Stopwatch, candidates: Any) -> dict[Planned, float]:
        return {one: given[one.microbatch] or 0.0 for one in candidates}

    def update_s(self: Stopwatch, job: AnyJob, account: Account) -> float:
        return 1.0

    def modelled(self: Planned, bytes_per_s: float) -> float:
        return float(self.microbatch)

    monkeypatch.setattr(Planned, "pass_s", modelled)
    monkeypatch.setattr(Stopwatch, "pass_s", pass_s)
    monkeypatch.setattr(Stopwatch, "in_turn", in_turn)
    monkeypatch.setattr(Stopwatch, "update_s", update_s)
    return given


def test_the_choice_is_the_most_samples_per_second(costs: dict[int, float | None]) -> None:
    costs.update({1: 2.2, 2: 3.5, 4: 8.4})
    found = tuned(Blocks(depth=1), total="1 MB", microbatches=[1, 2, 4], measure=3)
    assert (found.microbatch, found.accumulate) == (2, 4)
    assert found.choice.measured_s == 4 * 3.5 + 1.0
    assert found.choice.measured_per_s == 8 / 15
    assert found.update_s == 1.0 and found.plan is found.choice.plan
    assert found.plan.account is not None
    assert found.plan.account.peak_bytes == found.choice.peak_bytes <= found.total_bytes == 10**6


def test_those_that_fell_behind_stay_there_when_the_machine_slows(
    costs: dict[int, float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    costs.update({1: 1.3, 2: 2.1, 4: 4.0})
    blocks: list[list[int]] = []

    def slower(self: Stopwatch, candidates: Any) -> dict[Planned, float]:
        several = list(candidates)
        blocks.append([one.microbatch for one in several])
        return {one: {2: 6.0, 4: 13.0}[one.microbatch] for one in several}

    monkeypatch.setattr(Stopwatch, "in_turn", slower)
    found = tuned(Blocks(depth=1), total="1 MB", microbatches=[1, 2, 4], measure=3)
    assert blocks == [[2, 4], [2, 4]]  # 8 x 1 took 11.4 s beside 9; then 27 beside 25, 1.08 times
    assert (found.microbatch, found.choice.measured_s) == (2, 4 * 6.0 + 1.0)
    alone = {row.microbatch: row.measured_s for row in found.rows}
    assert alone[4] == 27.0 and alone[1] == pytest.approx(25 * 11.4 / 9)


def test_what_runs_out_of_memory_is_not_chosen(costs: dict[int, float | None]) -> None:
    costs.update({2: 3.0, 4: None})
    found = tuned(Blocks(depth=1), total="1 MB", microbatches=[2, 4], measure=3)
    assert found.microbatch == 2
    assert [row.failure for row in found.rows] == ["", "out of memory when it was measured"]


@pytest.mark.slow
def test_what_does_not_fit_is_never_run(timed: list[tuple[str, int]]) -> None:
    found = tuned(measure=9)
    rows = {row.microbatch: row for row in found.rows}
    assert list(rows) == [1, 2, 4, 8]
    assert rows[8].plan is None and rows[8].failure == "does not fit"
    assert (rows[8].peak_bytes or 0) > found.total_bytes
    fitting = {("eager", size) for size in (1, 2, 4)}
    assert set(timed) <= fitting and len(timed) == len(set(timed)) == len(found.measured)
    assert all((row.peak_bytes or 0) <= found.total_bytes for row in found.measured)
    assert found.choice in found.measured


def test_fewer_than_a_third_are_measured(timed: list[tuple[str, int]]) -> None:
    how: dict[str, Any] = {"total": "1 GB", "global_batch": 12, "microbatches": (3, 12)}
    found = tuned(Blocks(depth=1), mode=("eager", "compiled"), **how)
    assert len(timed) == 1 == len(found.measured) and found.rounds == 1
    assert {row.way for row in found.rows} == {"eager", "compiled"}
    assert all(row.recompute_share == 0 for row in found.rows if row.way == "eager")
    told = str(found)
    assert "1 of 4 candidates that fit were measured" in told and "<- chosen" in told


def test_nothing_is_recomputed_as_long_as_it_fits(curve: Tuned) -> None:
    rows = {row.microbatch: row for row in curve.rows if row.way == "eager"}
    assert rows[1].recompute_share == rows[2].recompute_share == 0
    assert (rows[4].recompute_share or 0) > 0


def test_values_may_move_where_something_is_recomputed(curve: Tuned) -> None:
    ways = [(row.way, row.microbatch) for row in curve.rows]
    assert ways[:4] == [("eager", size) for size in (1, 2, 4, 8)]
    assert ways[4:] == [("eager, offload", 4), ("eager, offload", 8)]


def test_microbatches_make_up_the_global_batch_exactly() -> None:
    assert microbatches_of(12, None) == (1, 2, 3, 4, 6, 12)
    assert microbatches_of(12, [6, 2, 6]) == (2, 6)
    for global_batch, asked in ((0, None), (2.0, None), (True, None), (12, [5]), (12, [])):
        with pytest.raises(TuneArgumentError, match="expected"):
            microbatches_of(global_batch, asked)  # type: ignore[arg-type]


def test_an_accumulated_step_is_planned_with_its_gradients() -> None:
    how: dict[str, Any] = {"total": "1 GB", "global_batch": 4, "microbatches": [2, 4]}
    found = tuned(Blocks(depth=1), measure=0, **how)
    several, one = (row.plan.account for row in found.rows if row.plan is not None)
    assert several is not None and one is not None
    assert several.keeps_gradients and not one.keeps_gradients


def test_named_arguments_and_a_loss() -> None:
    model = nn.Linear(8, 8)
    found = tune(
        model,
        lambda count: {"input": torch.randn(count, 8)},
        loss_fn=lambda y: y.square().mean(),
        total="1 MB",
        optimizer=sgd(model),
        global_batch=2,
        mode="eager",
        rounds=1,
    )
    assert found.measured


class Drawing(nn.Module):
    """It counts, normalises by statistics that it keeps, and draws."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Blocks(depth=1)
        self.norm = nn.BatchNorm1d(32)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        """The mean square of what comes out."""
        self.runs += 1
        loss: Tensor = self.blocks(torch.nn.functional.dropout(self.norm(x)))
        return loss


class Failing(Drawing):
    """On tensors with values it fails."""

    def forward(self, x: Tensor) -> Tensor:
        """Nothing, on real tensors."""
        loss = super().forward(x)
        if not isinstance(x, FakeTensor):
            raise ArithmeticError("too real")
        return loss


@pytest.mark.parametrize("cls", [Drawing, Failing])
def test_everything_is_left_as_it_was(cls: type[Drawing]) -> None:
    model = cls()
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    job = Job(optimizer, clip_norm=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    grads = [parameter.grad for parameter in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    groups = [dict(group) for group in optimizer.param_groups]
    drawn = torch.get_rng_state()
    if cls is Failing:
        with pytest.raises(ArithmeticError, match="too real"):
            tuned(model, optimizer=job, total="2 MB", global_batch=2, measure=2)
    else:
        tuned(model, optimizer=job, total="2 MB", global_batch=2, measure=2)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [parameter.grad for parameter in model.parameters()] == grads
    assert all(bool((grad == 1).all()) for grad in grads if grad is not None)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert model.runs == 0 and not ckpt_pass.is_checkpointed(model)
    assert not optimizer.state and [dict(group) for group in optimizer.param_groups] == groups
    assert scheduler.last_epoch == 0


def test_on_paper_nothing_is_run(timed: list[tuple[str, int]]) -> None:
    with torch.device("meta"):
        model = Blocks(depth=1)
    found = tune(
        model,
        lambda count: torch.empty(32 * count, 32, device="meta"),
        total="device",
        optimizer=sgd(model),
        global_batch=4,
        mode="eager",
        device="l4",
    )
    assert not timed and not found.measured and found.rounds == 0
    rates = [row.predicted_per_s or 0.0 for row in found.rows]
    assert found.choice.predicted_per_s == max(rates) and rates == sorted(rates)
    assert found.device == "l4 (24 GB), on paper" and "nothing was measured" in str(found)


def test_the_least_total_is_named_and_works() -> None:
    model = Blocks(depth=1)
    how: dict[str, Any] = {"measure": 0, "microbatches": [2]}
    with pytest.raises(InfeasibleTotalError, match="are missing") as error:
        tuned(model, total="20 kB", **how)  # less than its parameters
    least = error.value.needed_bytes
    assert tuned(model, total=least, **how).choice.peak_bytes == least


class Normed(nn.Module):
    """Does not run on one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The mean square of what comes out."""
        found: torch.Tensor = self.layers(x).square().mean()
        return found


def test_a_microbatch_that_does_not_run_is_left_out() -> None:
    model = Normed()
    how: dict[str, Any] = {"total": "1 MB", "optimizer": sgd(model), "mode": "eager", "measure": 0}
    found = ckpt_pass.tune(model, lambda n: torch.randn(n, 32), global_batch=4, **how)
    assert found.rows[0].failure == "cannot be traced" and found.microbatch > 1
    with pytest.raises(ckpt_pass.NotTraceableError, match="more than 1 value"):
        ckpt_pass.tune(model, lambda n: torch.randn(n, 32), global_batch=1, **how)


def test_what_is_no_job_is_one_message() -> None:
    model = Blocks(depth=1)
    refused: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TuneArgumentError, "global_batch=0", {"global_batch": 0}),
        (TuneArgumentError, r"microbatches=\[3\]", {"microbatches": [3]}),
        (InvalidTotalError, "total=None", {"total": None}),
        (TuneArgumentError, "measure=-1", {"measure": -1}),
        (TuneArgumentError, "rounds=0", {"rounds": 0}),
        (TuneArgumentError, "expected a function", {"make_batch": torch.ones(2)}),
        (TuneArgumentError, "same shapes", {"make_batch": lambda count: torch.ones(64, 32)}),
        (TuneArgumentError, "accumulate=4", {"optimizer": Job(sgd(model), accumulate=4)}),
        (StepArgumentError, "does not take", {"make_batch": lambda count: (batch(count), 1)}),
        (ForeignOptimizerError, "made with", {"optimizer": sgd(Blocks(depth=1))}),
        (PlanModeError, "mode='lazy'", {"mode": "lazy"}),
    ]
    for error, told, how in refused:
        with pytest.raises(error, match=told):
            tuned(model, **how)


def test_a_picture(tmp_path: Path, curve: Tuned) -> None:
    path = curve.save_plot(tmp_path / "tuned.png")
    assert path.read_bytes().startswith(b"\x89PNG")


FACTORY = """
import torch
from tests.job.jobs import Blocks

def make():
    return Blocks(depth=1), torch.randn(7, 32)
"""


@pytest.mark.slow
def test_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "factory.py").write_text(FACTORY)
    rows, plan = tmp_path / "rows.json", tmp_path / "plan.json"
    words = [
        "tune", f"{tmp_path / 'factory.py'}:make", "--total", "1MB", "--global-batch", "64",
        "--microbatch", "16", "--microbatch", "64", "--mode", "eager", "--optimizer", "SGD",
        "--measure", "1", "--rounds", "1", "--json", str(rows), "--save", str(plan),
    ]  # fmt: skip
    found = CliRunner().invoke(make_app(), words)
    assert found.exit_code == 0, found.output
    assert "<- chosen" in found.output and "fastest" in found.output
    assert [row["microbatch"] for row in json.loads(rows.read_text())["rows"]] == [16, 64]
    assert ckpt_pass.load_plan(plan).account is not None
    words[3] = "1kB"
    found = CliRunner().invoke(make_app(), words)
    assert found.exit_code == 1 and "does not fit 1,000 bytes" in found.output
