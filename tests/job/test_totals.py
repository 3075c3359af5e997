"""The memory of a whole job: predicted as measured, met, and told where it does not fit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ckpt_pass
from ckpt_pass import (
    ForeignOptimizerError,
    InfeasibleTotalError,
    InvalidTotalError,
    Job,
    Plan,
    PlanModeError,
    StepPlan,
)
from ckpt_pass.plans.account import UPDATE
from tests.job.jobs import Blocks, Mixed, job_peak

X = torch.randn(64, 32)
#: Of a total: numbers of kernels, which are counted as if they were always there.
NEAR = 0.002


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=True)


def ran(plan: Plan, model: nn.Module, job: Job, *args: Any) -> int:
    """The measured peak of the job, its step carried out as planned."""
    if plan.mode == "eager":
        with plan.applied(model) if plan.regions else contextlib.nullcontext():
            return job_peak(lambda: model(*args), model, args, job)
    compiled = torch.compile(model, backend=ckpt_pass.make_backend(plan=plan))
    compiled(*args).backward()
    model.zero_grad()
    return job_peak(lambda: compiled(*args), model, args, job)


def check(model: nn.Module, job: Job, *args: Any, mode: str = "eager", **how: Any) -> Plan:
    """A plan for a total between the least and the most; as predicted, and met."""
    plain = ckpt_pass.plan(model, *args, budget=1.0, optimizer=job, mode=mode, **how)
    assert plain.account is not None
    with pytest.raises(InfeasibleTotalError) as told:
        ckpt_pass.plan(model, *args, total=1000, optimizer=job, mode=mode, **how)
    total = (told.value.needed_bytes + plain.account.peak_bytes) // 2
    found = ckpt_pass.plan(model, *args, total=total, optimizer=job, mode=mode, **how)
    assert isinstance(found, Plan) and found.account is not None
    measured = ran(found, model, job, *args)
    assert 0 <= found.account.peak_bytes - measured <= NEAR * measured
    assert measured <= total
    assert ckpt_pass.plan(
        model, *args, total=told.value.needed_bytes, optimizer=job, mode=mode, **how
    )
    return found


@pytest.mark.parametrize(
    ("mode", "how"),
    [
        ("eager", {}),
        ("eager", {"accumulate": 4, "clip_norm": 1.0}),
        pytest.param("eager", {"set_to_none": False}, marks=pytest.mark.slow),
        ("eager", {"scaler": True, "clip_norm": 1.0}),
        ("compiled", {"accumulate": 2, "clip_norm": 1.0}),
        pytest.param("compiled", {}, marks=pytest.mark.slow),
        pytest.param("compiled", {"set_to_none": False}, marks=pytest.mark.slow),
        pytest.param("compiled", {"scaler": True}, marks=pytest.mark.slow),
    ],
)
def test_a_total_is_met_and_predicted(mode: str, how: dict[str, Any]) -> None:
    model = Blocks(depth=2)
    if "scaler" in how:
        how = {**how, "scaler": torch.amp.GradScaler("cpu")}
    check(model, Job(adamw(model), **how), X, mode=mode)


def test_autocast_inside_of_the_model() -> None:
    model = Mixed(depth=2)
    job = Job(torch.optim.SGD(model.parameters(), momentum=0.9), accumulate=2)
    check(model, job, X)


def test_microbatches_add_to_gradients_that_stand_there() -> None:
    """Each gradient is let go of when it is added, so that the step itself takes less."""
    model, x = Blocks(), X[:2]
    alone = ckpt_pass.plan(model, x, budget=1.0, optimizer=Job(adamw(model)), mode="eager")
    job = Job(adamw(model), accumulate=2)
    several = ckpt_pass.plan(model, x, budget=1.0, optimizer=job, mode="eager")
    assert several.peak_bytes < alone.peak_bytes
    alone_bytes = alone.account.pass_standing_bytes + alone.peak_bytes
    assert several.account.pass_standing_bytes + several.peak_bytes > alone_bytes
    assert several.account.keeps_gradients and not alone.account.keeps_gradients


class Extended(nn.Module):
    """A few trained rows after a frozen table: their gradient is a part of the whole one's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(300, 32))
        self.new, self.layer = nn.Parameter(torch.randn(4, 32)), nn.Linear(32, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The mean square of what comes out."""
        rows = nn.functional.embedding(ids, torch.cat([self.table, self.new]))
        found: torch.Tensor = self.layer(rows).square().mean()
        return found


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("how", [{}, {"accumulate": 2}])
def test_gradients_that_are_parts_of_something_larger(mode: str, how: dict[str, Any]) -> None:
    model = Extended()
    found = check(model, Job(adamw(model), **how), torch.randint(0, 300, (4, 8)), mode=mode)
    own = sum(p.nbytes for p in model.parameters())
    assert found.account is not None and found.account.gradients_bytes == own + 300 * 32 * 4
    assert Plan.from_json(found.to_json()).predicted.beside_gradients_bytes == 300 * 32 * 4


def test_where_the_peak_is_in_the_optimizers_step() -> None:
    """Little to save, much to step: no plan helps, and that is said."""
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    optimizer, x = adamw(model), torch.randn(2, 256)

    def loss(y: torch.Tensor) -> torch.Tensor:
        return y.square().mean()

    found = ckpt_pass.plan(model, x, budget=1.0, optimizer=optimizer, mode="eager", loss_fn=loss)
    peak = found.account.peak_bytes
    assert found.account.peak_phase.name.endswith(UPDATE)
    assert peak >= found.account.pass_standing_bytes + found.peak_bytes
    with pytest.raises(InfeasibleTotalError, match="optimizer step") as told:
        ckpt_pass.plan(model, x, total=peak - 1, optimizer=optimizer, mode="eager", loss_fn=loss)
    assert told.value.needed_bytes == peak and told.value.account.total_bytes == peak - 1


def test_the_account_is_a_part_of_the_plan_and_of_its_file(tmp_path: Any) -> None:
    model = Blocks()
    found = ckpt_pass.plan(model, X, total="1 MB", optimizer=adamw(model), mode="eager")
    text = str(found)
    for words in ("the job on cpu: AdamW", "optimizer states", "<- the job's peak", "are left"):
        assert words in text
    read = Plan.load(found.save(tmp_path / "plan.json"))
    assert read.account == found.account and read.account.total_bytes == 1_000_000
    assert found.account.plot(tmp_path / "account.png").stat().st_size > 1000


class Cut(Blocks):
    """Dynamo cuts it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The mean square of what comes out."""
        x = self.blocks[0](x)
        torch._dynamo.graph_break()
        return self.blocks[1](x).square().mean()


def test_a_step_of_several_graphs_has_an_account() -> None:
    model = Cut()
    found = ckpt_pass.plan(model, X, total="1 MB", optimizer=adamw(model))
    assert isinstance(found, StepPlan) and found.account is not None
    assert found.account.gradients_bytes == sum(p.nbytes for p in model.blocks[:2].parameters())
    assert StepPlan.from_json(found.to_json()).account == found.account
    assert "the job on cpu" in str(found)


def test_make_backend_apply_and_verify_take_a_total() -> None:
    model = Blocks(depth=1)
    optimizer = adamw(model)
    with pytest.raises(InfeasibleTotalError) as told:
        ckpt_pass.plan(model, X, total=1000, optimizer=optimizer)
    total = told.value.needed_bytes + 20_000
    backend = ckpt_pass.make_backend(total=total, optimizer=optimizer, inner="aot_eager")
    torch.compile(model, backend=backend)(X).backward()
    account = backend.plans[-1].account
    assert account is not None and account.total_bytes == total >= account.peak_bytes
    assert not optimizer.state
    model.zero_grad()
    with pytest.raises(InfeasibleTotalError) as told:  # an eager step needs more
        ckpt_pass.apply(model, total=1000, optimizer=optimizer, example_inputs=X)
    total = told.value.needed_bytes
    choice = ckpt_pass.apply(model, total=total, optimizer=optimizer, example_inputs=X)
    assert choice and choice.placement == f"total-{total}"
    ckpt_pass.remove(model)
    verdict = ckpt_pass.verify(model, X, total=total, optimizer=optimizer, mode="eager")
    verdict.raise_if_failed()
    assert [check.what for check in verdict.checks][-2:] == [
        "peak of the job, predicted",
        "peak of the job, total",
    ]


@pytest.mark.slow
def test_fit_lets_the_batch_grow_within_a_total() -> None:
    model = Blocks(depth=1)
    optimizer, total = adamw(model), 400_000
    fitted = ckpt_pass.fit(model, X, total=total, optimizer=optimizer)
    assert fitted.plan.account is not None
    assert fitted.plan.account.peak_bytes <= total < (fitted.next_peak_bytes or 0)


def test_budget_device_leaves_room_for_what_is_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is free is what a step may take, less states that are not there yet."""
    free = 1_000_000
    monkeypatch.setattr("ckpt_pass.job.totals.free_device_bytes", lambda: free)
    model = Blocks()
    optimizer = adamw(model)
    found = ckpt_pass.plan(model, X, budget="device", optimizer=optimizer, mode="eager")
    account = found.account
    assert account is not None and account.total_bytes == int(free * 0.92)
    assert found.budget_bytes == account.total_bytes - account.standing_bytes


@pytest.mark.parametrize(
    ("error", "words", "how"),
    [
        (InvalidTotalError, "without an optimizer", {"total": "1GB", "optimizer": None}),
        (InvalidTotalError, "one of the two", {"total": "1GB", "budget": 0.5}),
        (InvalidTotalError, "total='much'", {"total": "much"}),
        (InvalidTotalError, "total=0", {"total": 0}),
        (InvalidTotalError, "total=0.5", {"total": 0.5}),
        (InvalidTotalError, "no accelerator", {"total": "device"}),
        (PlanModeError, "dynamic=True", {"total": "1GB", "dynamic": True}),
        (PlanModeError, "which are for eager plans", {"total": "1GB", "in_flight": 2}),
        (InfeasibleTotalError, "are missing", {"total": 1}),
    ],
)
def test_arguments_that_do_not_go(error: type[Exception], words: str, how: dict[str, Any]) -> None:
    if torch.cuda.is_available() and how.get("total") == "device":
        pytest.skip("there is an accelerator")
    model = Blocks(depth=1)
    options = {"optimizer": adamw(model), **how}
    with pytest.raises(error, match=words):
        ckpt_pass.plan(model, X, **options)
    if error is InvalidTotalError and how.get("total") != "device":
        with pytest.raises(error, match=words):
            ckpt_pass.make_backend(**options)


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(ForeignOptimizerError, match="none of the model's"):
        ckpt_pass.plan(Blocks(), X, total="1GB", optimizer=adamw(Blocks()))


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], list[torch.optim.Optimizer]]] = {
    "sgd": lambda p: [torch.optim.SGD(p, momentum=0.9)],
    "foreach": lambda p: [torch.optim.AdamW(p, foreach=True)],
    "fused": lambda p: [torch.optim.AdamW(p, fused=True)],
    "adafactor": lambda p: [torch.optim.Adafactor(p)],
    "muon": lambda p: [
        torch.optim.Muon([q for q in p if q.ndim == 2]),
        torch.optim.AdamW([q for q in p if q.ndim != 2]),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "bert", "vit", "resnet"])
def test_models_of_the_zoo(name: str, optimizer: str) -> None:
    hf = pytest.importorskip("tests.zoo.hf")
    if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    model, args = getattr(hf, name)()
    made = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    check(model, Job(made), *args)
