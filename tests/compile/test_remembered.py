"""What the rounds found is found again beside inductor's caches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import ckpt_pass
from ckpt_pass._torch.compilers import inductor_cache_folder
from ckpt_pass.compile import remembered
from ckpt_pass.compile.remembered import recalled

SCRIPT = """
import torch, ckpt_pass
from torch._dynamo.utils import counters
from tests.compile.test_remembered import Net, step
plan, _ = step(Net(24), torch.randn(40, 24), 0.8)
hits = counters["aot_autograd"]["autograd_cache_hit"]
print("found", hits, plan.fingerprint, plan.peak_bytes, plan.inner_peak_bytes)
"""


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.sin(self.first(x)).exp()).cos().square().mean()


def step(
    net: nn.Module, x: Tensor, budget: float | int, **options: object
) -> tuple[ckpt_pass.Plan, int]:
    """Compile and run a step as a new process would; the plan, and the peak of another step."""
    torch._dynamo.reset()
    counters.clear()
    backend = ckpt_pass.make_backend(budget=budget, inner="inductor", inner_options=options)
    compiled = torch.compile(net, backend=backend)
    net.zero_grad(set_to_none=True)
    compiled(x).backward()
    gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    measured = ckpt_pass.measure_step(lambda: compiled(x), repeats=1, params=net.parameters())
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        parameter.grad = gradient
    (plan,) = backend.plans
    return plan, measured.peak_bytes


def hits() -> int:
    return int(counters["aot_autograd"]["autograd_cache_hit"])


def folder() -> Path:
    return inductor_cache_folder() / remembered.FOLDER


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test processes side by side share inductor's caches; entries are counted here."""
    monkeypatch.setattr(remembered, "FOLDER", f"ckpt_pass-{os.getpid()}")


def entries() -> dict[Path, str]:
    return {path: path.read_text() for path in folder().glob("*.json")}


@pytest.fixture
def known() -> Iterator[tuple[Net, Tensor, ckpt_pass.Plan, Path]]:
    """A step that was compiled before, its plan and its file."""
    net, x = Net(20), torch.randn(36, 20)
    for path in entries():
        path.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ckpt_pass.errors.PlanCacheWarning)
        plan, _ = step(net, x, 0.85)
    (path,) = entries()
    assert not hits()
    yield net, x, plan, path


def test_nothing_is_planned_again(known: tuple[Net, Tensor, ckpt_pass.Plan, Path]) -> None:
    net, x, first, path = known
    gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    text = path.read_text()
    plan, peak_bytes = step(net, x, 0.85)
    assert hits() == 1 and plan == first and entries() == {path: text}
    assert peak_bytes == plan.peak_bytes == plan.inner_peak_bytes
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
    # Another budget, other sizes and other options are other entries.
    step(net, x, 0.9)
    assert not hits() and len(entries()) == 2
    step(net, x[:30], 0.85, max_fusion_size=8)
    assert not hits() and len(entries()) == 3


def test_what_cannot_be_read_is_made_again(
    known: tuple[Net, Tensor, ckpt_pass.Plan, Path],
) -> None:
    net, x, first, path = known
    text = path.read_text()
    data = json.loads(text)
    changed = {**data, "plan": data["plan"].replace("saved", "spoiled", 1)}
    for spoiled in ("", text[:1000], "[]", json.dumps({**data, "careful": 2}), json.dumps(changed)):
        path.write_text(spoiled)
        with pytest.warns(ckpt_pass.errors.PlanCacheWarning, match="made again"):
            assert recalled(path.stem, lambda *_: pytest.fail("compiled")) is None
    with pytest.warns(ckpt_pass.errors.PlanCacheWarning, match="made again"):
        plan, peak_bytes = step(net, x, 0.85)
    assert not hits() and plan == first and peak_bytes == plan.peak_bytes
    assert json.loads(path.read_text())["plan"] == first.to_json()


def test_a_plan_is_not_taken_without_what_was_compiled_for_it(
    known: tuple[Net, Tensor, ckpt_pass.Plan, Path],
) -> None:
    net, x, first, path = known
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "artefacts": "others"}))
    plan, peak_bytes = step(net, x, 0.85)
    assert not hits() and plan == first and peak_bytes == plan.peak_bytes
    assert json.loads(path.read_text())["artefacts"] not in ("others", data["artefacts"])


def test_nothing_is_kept_where_torch_keeps_nothing() -> None:
    net, x = Net(28), torch.randn(36, 28)
    before = entries()
    plan, peak_bytes = step(net, x, 0.85, fx_graph_cache=False)
    assert entries() == before and peak_bytes == plan.peak_bytes


@pytest.mark.slow
def test_another_process_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    command = [sys.executable, "-c", SCRIPT]
    first, second = (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        for _ in range(2)
    )
    assert first[:2] == ["found", "0"] and second[:2] == ["found", "1"]
    assert first[2:] == second[2:]


class Sine(torch.autograd.Function):
    """Torch's cache passes graphs over that have such a Function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        found: Tensor = gradients[0] * ctx.saved_tensors[0].cos()
        return found


class WithFunction(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(Sine.apply(self.first(x)))


def test_what_torch_does_not_keep_does_not_fill_its_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # others write to the shared one
    net, x = WithFunction(20), torch.randn(36, 20)
    kept = inductor_cache_folder() / "fxgraph"
    first, _ = step(net, x, 0.85)
    assert counters["aot_autograd"]["autograd_cache_bypass"]
    (text,) = entries().values()
    assert json.loads(text)["artefacts"] == ""
    before = set(kept.rglob("*"))
    assert before
    plan, peak_bytes = step(net, x, 0.85)
    assert plan == first and peak_bytes == plan.peak_bytes
    assert set(kept.rglob("*")) == before
