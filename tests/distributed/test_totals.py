"""The account of a job on one rank of many: what it has, gathers and exchanges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import ckpt_pass
from ckpt_pass import Account, Job
from tests.distributed.ranks import batch, made, own
from tests.distributed.test_simulated_ranks import sharded
from tests.job.jobs import peak_above, train

pytestmark = pytest.mark.distributed
MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


@dataclass(frozen=True)
class Case:
    """A job, and how its model is sharded."""

    cls: Callable[..., torch.optim.Optimizer]
    options: dict[str, Any] = field(default_factory=dict)
    around: dict[str, Any] = field(default_factory=dict)
    how: dict[str, Any] = field(default_factory=dict)

    def job(self, model: nn.Module) -> Job:
        return Job(self.cls(model.parameters(), **self.options), **self.around)


CASES = {
    "AdamW": Case(torch.optim.AdamW),
    "AdamW, foreach": Case(torch.optim.AdamW, {"foreach": True}),
    "AdamW, fused, added up": Case(torch.optim.AdamW, {"fused": True}, {"accumulate": 2}),
    "SGD, clipped": Case(torch.optim.SGD, {"momentum": 0.9}, {"clip_norm": 1.0}),
    "mixed precision": Case(torch.optim.AdamW, how={"mp_policy": MIXED}),
}


def standing(model: nn.Module, x: Tensor) -> int:
    """Bytes that the model holds of its parameters, and those of the input."""
    held = [*(own(tensor) for tensor in model.parameters()), x]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held}.values())


def planned(model: nn.Module, x: Tensor, job: Job, total: int = 10**7) -> Any:
    return ckpt_pass.plan(model, x, total=total, optimizer=job, mode="eager")


def agree(account: Account, measured: int) -> None:
    """The measured peak is that of the account, and within the total."""
    assert account.total_bytes is not None
    assert abs(account.peak_bytes - measured) <= 0.005 * measured
    assert measured <= account.total_bytes + 0.0005 * measured


@pytest.mark.parametrize("name", CASES)
def test_the_job_of_a_rank_that_shards(two_ranks: None, name: str) -> None:
    """Three steps really run, within a total that is too small without recomputation."""
    case, x = CASES[name], batch(0)
    model = sharded(made(2), **case.how)
    plain = planned(model, x, case.job(model))
    plan = planned(model, x, case.job(model), plain.account.peak_bytes - plain.peak_bytes // 30)
    account = plan.account
    assert plan.regions
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert account.parameters_bytes == account.gradients_bytes == standing(model, x) - x.nbytes
    plan.apply(model)
    job = case.job(model)
    agree(account, standing(model, x) + peak_above(lambda: train(lambda: model(x), model, job)))


def test_the_step_of_the_optimizer_on_what_a_rank_has(two_ranks: None) -> None:
    model, x = sharded(made(9)), batch(0, rows=1)
    job = Job(torch.optim.AdamW(model.parameters(), foreach=True))
    account = planned(model, x, job).account
    assert "optimizer step" in account.peak_phase.name
    peak = peak_above(lambda: train(lambda: model(x), model, job))
    agree(account, standing(model, x) + peak)


def test_gradients_of_half_the_size_are_no_cure(two_ranks: None) -> None:
    """Of parameters that are sharded the gradients are what the library makes of them."""
    model, x = sharded(made(1)), batch(0, rows=1)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    found = ckpt_pass.doctor(model, x, total=1000, optimizer=optimizer, mode="eager")
    assert not found.fits and not found.cures and not found.short


def test_a_rank_on_paper(two_ranks: None) -> None:
    """Of meta tensors as of real ones."""
    found = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = sharded(made(1))
        optimizer = torch.optim.AdamW(model.parameters())
        x = torch.empty(64, 32, device=device)
        options: dict[str, Any] = {"optimizer": optimizer, "device": "l4", "mode": "eager"}
        found.append(ckpt_pass.doctor(model, x, total="11MB", **options))
    real, meta = found
    assert real.fits and real.account == meta.account
    assert real.account.parameters_bytes < sum(p.nbytes for p in made(1).parameters())


@pytest.mark.parametrize("around", [{}, {"set_to_none": False}, {"accumulate": 2}])
@pytest.mark.parametrize("views", [True, False])
def test_buckets_stand_there(one_rank: None, views: bool, around: dict[str, Any]) -> None:
    """Beside the gradients, or as them, from the first step on."""
    x = batch(0)

    def wrapped() -> nn.Module:
        return DistributedDataParallel(made(1), gradient_as_bucket_view=views)

    def job(model: nn.Module) -> Job:
        return Job(torch.optim.AdamW(model.parameters()), **around)

    model = wrapped()
    account = planned(model, x, job(model)).account
    assert account.gradients_bytes == account.parameters_bytes
    assert account.buffers_bytes == (0 if views else account.parameters_bytes)
    for phase in account.phases:
        assert sum(nbytes for _, nbytes in account.parts(phase)) == phase.peak_bytes

    def run() -> None:
        other = wrapped()
        train(lambda: other(x), other, job(other))

    # The threads that exchange let go of old buckets late at times.
    agree(account, x.nbytes + min(peak_above(run) for _ in range(3)))


def test_no_compiled_plans_with_an_account(one_rank: None) -> None:
    for model in (DistributedDataParallel(made()), sharded(made())):
        optimizer, x = torch.optim.AdamW(model.parameters()), batch(0)
        for tool in (ckpt_pass.plan, ckpt_pass.fit, ckpt_pass.doctor):
            with pytest.raises(ckpt_pass.PlanModeError, match="in no account of a compiled plan"):
                tool(model, x, total="1MB", optimizer=optimizer)
        with pytest.raises(ckpt_pass.PlanModeError, match="in no account of a compiled plan"):
            ckpt_pass.tune(
                model, batch, total="1MB", optimizer=optimizer, mode=["eager", "compiled"]
            )
