"""``verify`` passes what holds, and catches what does not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass
from ckpt_pass.cli.commands import make_app
from ckpt_pass.tools.arguments import without_histories
from tests.zoo import hf

LARGE: dict[str, Callable[[], Any]] = {"gpt2-12L": hf.gpt2_12l, "llama-16L": hf.llama_16l}


def least_budget(model: nn.Module, args: Any, mode: str) -> int:
    with pytest.raises(ckpt_pass.InfeasibleBudgetError) as caught:
        ckpt_pass.plan(model, *args, budget=1, mode=mode)
    return caught.value.least_feasible_bytes


@pytest.mark.parametrize("mode", ["compiled", "eager"])
@pytest.mark.parametrize(
    "name",
    [name if name == "gpt2" else pytest.param(name, marks=pytest.mark.slow)
     for name in hf.MODELS],
)  # fmt: skip
def test_plans_hold(name: str, mode: str) -> None:
    model, args = hf.MODELS[name]()
    budget = least_budget(model, args, mode)
    found = ckpt_pass.verify(model, *args, budget=budget, mode=mode)
    assert found.ok, str(found)
    assert {check.what for check in found.checks} == {
        "loss",
        "gradients and buffers",
        "peak, predicted",
        "peak, budget",
        "recomputed flops",
    }


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["compiled", "eager"])
@pytest.mark.parametrize("name", LARGE)
def test_plans_of_large_models_hold(name: str, mode: str) -> None:
    model, args = LARGE[name]()
    found = ckpt_pass.verify(model, *args, budget=0.4, mode=mode)
    assert len(found.checks) == 5
    assert found.ok, str(found)


def test_an_eager_policy_holds() -> None:
    model, args = hf.gpt2()
    ckpt_pass.verify(model, *args, policy="save-matmul", mode="eager").raise_if_failed()


def test_steps_of_the_same_code_and_other_shapes_hold_one_after_the_other() -> None:
    for rows in (48, 32):
        model = Dropping(plainly)
        found = ckpt_pass.verify(model, torch.randn(rows, 64), policy="save-matmul")
        assert found.ok, str(found)


def test_tensors_that_a_step_leaves_on_modules_are_there_until_its_backward_is_over() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.utils.spectral_norm(nn.Linear(32, 128))  # sets ``weight`` in each forward
            self.down = nn.Linear(128, 32)

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.down(nn.functional.gelu(self.up(x)))).square().mean()

    found = ckpt_pass.verify(Normed(), torch.randn(256, 32), budget=1.0)
    assert found.ok, str(found)
    peak = next(check for check in found.checks if check.what == "peak, predicted")
    assert peak.got == peak.expected


@pytest.mark.parametrize("mode", ["compiled", "eager"])
def test_inputs_that_a_step_writes_to(mode: str) -> None:
    class Scaling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in "ab"))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x.mul_(0.9)
            return self.layers(x).square().mean()

    x = torch.randn(64, 8)
    before = x.clone()
    found = ckpt_pass.verify(Scaling(), x, budget=1.0, mode=mode)
    assert found.ok, str(found)
    assert torch.equal(x, before)


@pytest.mark.slow
def test_a_policy_holds_compiled() -> None:
    model, args = hf.gpt2()
    ckpt_pass.verify(model, *args, policy="save-matmul").raise_if_failed()


class Dropping(nn.Module):
    """A region with dropout; ``around`` makes it one."""

    def __init__(self, around: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Dropout()) for _ in "1234")
        self.around = around

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.around(lambda v, layer=layer: layer(v).sigmoid(), x)
        return x.sum()


def verdict_of(around: Callable[..., Tensor], plain: Callable[..., Tensor]) -> ckpt_pass.Verdict:
    """Verify a model whose planned side (regions applied) calls ``around``."""
    model = Dropping(plain)
    args = (torch.randn(256, 64),)

    class Sabotaged(Dropping):
        def forward(self, x: Tensor) -> Tensor:
            applied = any("forward" in module.__dict__ for module in self.modules())
            self.around = around if applied else plain
            return super().forward(x)

    model.__class__ = Sabotaged
    return ckpt_pass.verify(model, *args, policy="save-nothing", mode="eager")


def plainly(fn: Callable[..., Tensor], x: Tensor) -> Tensor:
    return fn(x)


def test_a_recomputed_dropout_without_its_random_state_is_caught() -> None:
    forgetful = functools.partial(ckpt_pass.checkpoint, preserve_rng_state=False)
    found = verdict_of(forgetful, plainly)
    assert not found.ok
    (failed, *_) = [check for check in found.checks if not check.ok]
    assert failed.what == "gradients and buffers"
    with pytest.raises(ckpt_pass.VerificationError, match="random numbers drawn anew"):
        found.raise_if_failed()


def test_a_region_that_does_something_else_is_caught() -> None:
    found = verdict_of(lambda fn, x: fn(x) * 1.5, plainly)
    assert not found.ok
    assert "FAILED" in str(found)


def test_no_layers_to_wrap() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ckpt_pass.NoRegionsError, match="No layers were found"):
        ckpt_pass.verify(
            model, torch.randn(2, 2), policy="save-matmul", mode="eager", loss_fn=torch.sum
        )


FACTORY = """
import torch
from torch import nn


class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.sum()


def factory():
    torch.manual_seed(0)
    return Loss(), (torch.randn(64, 8),)
"""


def test_the_command(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    (tmp_path / "model.py").write_text(FACTORY)
    target, file = f"{tmp_path / 'model.py'}:factory", str(tmp_path / "plan.json")
    run = functools.partial(CliRunner().invoke, make_app())
    made = run(["plan", target, "--budget", "0.9", "--eager", "--save", file])
    assert made.exit_code == 0, made.output
    found = run(["verify", target, "--plan", file])
    assert found.exit_code == 0, found.output
    assert "gradients and buffers" in found.output and "FAILED" not in found.output
    assert run(["verify", target, "--policy", "save-matmul"]).exit_code == 0
    moved = run(["verify", target, "--budget", "0.9", "--eager", "--offload", "host"])
    assert moved.exit_code == 0, moved.output
    wrong = run(["verify", target, "--budget", "0.9", "--inner", "inductr"])
    assert wrong.exit_code == 1
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    assert run(["verify", target, "--plan", str(broken)]).exit_code == 1


@pytest.mark.parametrize("mode", ["compiled", "eager"])
def test_arguments_with_a_history_are_leaves_of_the_step(mode: Any) -> None:
    """A backward goes through it but once, and the step is run again and again."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    x = torch.randn(64, 16, requires_grad=True) * 2
    loss_fn = torch.mean
    how: dict[str, Any] = {"mode": mode, "loss_fn": loss_fn}
    plan = ckpt_pass.plan(model, x, budget=1.0, **how)
    ckpt_pass.verify(model, x, plan=plan, **how).raise_if_failed()
    if mode == "eager":
        leaf = x.detach().requires_grad_()
        assert plan.peak_bytes == ckpt_pass.plan(model, leaf, budget=1.0, **how).peak_bytes


def test_an_argument_with_a_history_that_is_given_twice_stays_one() -> None:
    x, y = torch.randn(4, requires_grad=True) * 2, torch.randn(4)
    (one, other), named = without_histories(((x, [x]), {"y": y}))
    assert one is other[0] and one.is_leaf and one.requires_grad and named["y"] is y
    assert one.data_ptr() == x.data_ptr() and x.grad_fn is not None
