"""What would make a job fit is computed, and fits as it says when it is done."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

import ckpt_pass
from ckpt_pass import Device, InfeasibleTotalError, Job
from ckpt_pass.job.totals import Cure
from tests.job.jobs import Blocks, job_peak

X = torch.randn(64, 32)


class Wide(nn.Module):
    """Large parameters, small activations: the optimizer's step is the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The mean square of what comes out."""
        for layer in self.layers:
            x = layer(x).relu()
        return x.square().mean()


def told(model: nn.Module, x: torch.Tensor, total: int, **how: Any) -> InfeasibleTotalError:
    with pytest.raises(InfeasibleTotalError) as error:
        ckpt_pass.plan(model, x, total=total, mode="eager", **how)
    return error.value


def named(error: InfeasibleTotalError, words: str) -> Cure:
    found = next(cure for cure in error.cures if words in cure.words)
    assert words in str(error) and found.needed_bytes <= error.total_bytes
    return found


def fits(model: nn.Module, x: torch.Tensor, cure: Cure, total: int, **how: Any) -> None:
    """Done, it takes what was said."""
    plan = ckpt_pass.plan(model, x, total=total, mode="eager", **how)
    assert plan.account is not None and plan.account.peak_bytes <= total
    assert abs(plan.account.peak_bytes - cure.needed_bytes) <= 0.01 * total


def least(model: nn.Module, x: torch.Tensor, **how: Any) -> int:
    return told(model, x, 1000, **how).needed_bytes


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": False}])
def test_other_kernels_of_the_same_optimizer(options: dict[str, bool]) -> None:
    model, x = Wide(), torch.randn(2, 128)
    foreach = torch.optim.AdamW(model.parameters(), foreach=True)
    total = least(model, x, optimizer=foreach) - 1000
    error = told(model, x, total, optimizer=foreach)
    (name, value), *_ = options.items()
    cure = named(error, f"{name}={value}")
    fits(model, x, cure, total, optimizer=torch.optim.AdamW(model.parameters(), **options))
    assert foreach.defaults["foreach"] and foreach.param_groups[0]["foreach"]  # as it was


class Picky(torch.optim.AdamW):
    """Its fused kernels do not take these tensors."""

    def step(self, closure: Any = None) -> Any:
        """AdamW's, if it is not fused."""
        if self.param_groups[0]["fused"]:
            raise RuntimeError("no such kernel")
        return super().step(closure)


def test_kernels_that_do_not_take_the_tensors_are_no_cure() -> None:
    model, x = Wide(), torch.randn(2, 128)
    optimizer = Picky(model.parameters(), foreach=True)
    error = told(model, x, least(model, x, optimizer=optimizer) - 1000, optimizer=optimizer)
    assert named(error, "foreach=False") == error.cures[0]


@pytest.mark.slow
def test_gradients_that_are_let_go_of() -> None:
    model = Blocks()
    optimizer = torch.optim.SGD(model.parameters())
    kept = Job(optimizer, set_to_none=False)
    total = least(model, X, optimizer=kept) - 5000
    cure = named(told(model, X, total, optimizer=kept), "set_to_none=True")
    fits(model, X, cure, total, optimizer=optimizer)


def test_smaller_microbatches_and_more_of_them() -> None:
    model = Blocks()
    optimizer = torch.optim.SGD(model.parameters())
    job = Job(optimizer, accumulate=2)  # gradients stand there already
    total = least(model, X, optimizer=job) - 5000
    cure = named(told(model, X, total, optimizer=job), "microbatches of 32, accumulate=4")
    fits(model, X[:32].clone(), cure, total, optimizer=Job(optimizer, accumulate=4))


@pytest.mark.slow
def test_values_that_move() -> None:
    model, x = Blocks(depth=4), torch.randn(63, 32)  # of an odd batch there are no halves
    optimizer = torch.optim.SGD(model.parameters())
    total = least(model, x, optimizer=optimizer)
    moved = least(model, x, optimizer=optimizer, offload=True)
    if moved >= total:
        pytest.skip("nothing is gained by moving here")
    error = told(model, x, (total + moved) // 2, optimizer=optimizer)
    cure = named(error, "offload=True")
    fits(model, x, cure, error.total_bytes, optimizer=optimizer, offload=True)


def test_gradients_of_half_the_size() -> None:
    model, x = Wide(), torch.randn(1, 128)  # of one sample there are no smaller microbatches
    job = Job(torch.optim.SGD(model.parameters(), momentum=0.9), clip_norm=1.0)
    total = least(model, x, optimizer=job) - 20_000
    model(x).backward()
    grads = [parameter.grad for parameter in model.parameters()]
    cure = named(told(model, x, total, optimizer=job), "gradients in bfloat16")
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert parameter.grad is grad and parameter.grad_dtype is torch.float32
        parameter.grad = None
    for parameter in model.parameters():
        parameter.grad_dtype = torch.bfloat16
    fits(model, x, cure, total, optimizer=job)
    peak = job_peak(lambda: model(x), model, (x,), job)
    assert peak <= total


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}])
def test_no_gradients_that_the_optimizer_does_not_take(options: dict[str, bool]) -> None:
    model, x = Wide(), torch.randn(1, 128)
    fused = torch.optim.AdamW(model.parameters(), **options)
    error = told(model, x, least(model, x, optimizer=fused) - 20_000, optimizer=fused)
    assert not any("bfloat16" in cure.words for cure in error.cures)
    assert not fused.state and all(p.grad is None for p in model.parameters())


class AdamW8bit(torch.optim.Optimizer):
    """In the place of torchao's: moments of 8 bits."""

    def __init__(self, params: Any, amsgrad: bool = False) -> None:
        super().__init__(params, {"amsgrad": amsgrad})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Makes the states, and changes nothing."""
        for parameter in (p for group in self.param_groups for p in group["params"]):
            for name in ("exp_avg", "exp_avg_sq") if parameter.grad is not None else ():
                if name not in self.state[parameter]:
                    self.state[parameter][name] = torch.zeros_like(parameter, dtype=torch.uint8)


def test_moments_of_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", sys.modules[__name__])
    model, x = Wide(), torch.randn(1, 128)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    total = least(model, x, optimizer=optimizer) - 100_000
    cure = named(told(model, x, total, optimizer=optimizer), "torchao.optim.AdamW8bit")
    fits(model, x, cure, total, optimizer=AdamW8bit(model.parameters()))


def test_a_larger_card_where_the_job_is_on_paper() -> None:
    with torch.device("meta"):
        model, x = nn.Linear(100_000, 10_000), torch.zeros(1, 100_000)
    small = Device("small", 10 * 10**9, (("float32", 1e13),), 1e12, 1e10)
    error = told(
        model, x, "device", optimizer=torch.optim.AdamW(model.parameters(), fused=True),
        device=small, loss_fn=torch.sum,
    )  # fmt: skip
    cure = error.cures[-1]
    assert cure.is_device and cure.words == "a l4 (24 GB)"
    fits(
        model, x, cure, 24 * 10**9, optimizer=torch.optim.AdamW(model.parameters(), fused=True),
        device="l4", loss_fn=torch.sum,
    )  # fmt: skip


def test_all_of_the_card_where_the_total_is_a_part_of_it() -> None:
    model = Blocks(depth=1)
    optimizer = torch.optim.SGD(model.parameters())
    error = told(model, X, 1000, optimizer=optimizer, device="l4")
    assert [cure.words for cure in error.cures] == ["all that l4 (24 GB) has"]
    assert ckpt_pass.plan(model, X, total="device", optimizer=optimizer, device="l4", mode="eager")


def test_none_where_there_is_none() -> None:
    model = Blocks(depth=1)
    error = told(model, X, 1000, optimizer=torch.optim.SGD(model.parameters()))
    assert error.cures == () and "Give a larger total" in str(error)


class Own(torch.optim.Optimizer):
    """What an optimizer's own code may raise on tensors that it was not written for."""

    def __init__(self, model: nn.Module, why: str) -> None:
        super().__init__(model.parameters(), {})
        self.why = why

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for p in (p for group in self.param_groups for p in group["params"]):
            if self.why == "assert":
                assert p.grad.dtype == p.dtype
            elif self.why == "index":
                p[..., 5] -= p.grad[..., 5]
            elif "scale" in self.state[p]:  # the second step's kernel wants one dtype
                p.sub_(p.grad.flatten().dot(self.state[p]["scale"].flatten()))
            self.state[p]["scale"] = torch.ones_like(p)


@pytest.mark.parametrize("why", ["assert", "index", "second step"])
def test_an_optimizer_that_takes_no_other_gradients(why: str) -> None:
    """Whatever it raises when that is tried, and whenever: it is no cure."""
    model, x = Wide(), torch.randn(2, 128)
    error = told(
        model, x, least(model, x, optimizer=Own(model, why)) - 1000, optimizer=Own(model, why)
    )
    assert not any("bfloat16" in cure.words for cure in (*error.cures, *error.short))


class FixedBatch(Blocks):
    """Runs with a batch of 64 alone."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.register_buffer("table", torch.ones(64, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The mean square of what comes out."""
        return super().forward(x * self.table)


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_a_batch_that_cannot_be_smaller_is_no_cure(mode: str) -> None:
    """It still fits or does not, and other cures are found."""
    model = FixedBatch()
    optimizer = torch.optim.SGD(model.parameters())
    total = least(model, X, optimizer=optimizer) - 1000
    found = ckpt_pass.doctor(model, X, total=total, optimizer=optimizer, mode=mode)
    assert found.fits == (mode == "compiled")
    assert not any("microbatches" in cure.words for cure in (*found.cures, *found.short))
    assert not ckpt_pass.doctor(model, X, total=total // 2, optimizer=optimizer, mode=mode).fits
