"""Moves in inductor's code: right gradients, the peak that its code tells, memory left alone."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.utils import run_and_get_code

import ckpt_pass
from ckpt_pass import Offload
from ckpt_pass.offloading.stores import close_shared_stores, host_store, store_for
from tests.zoo import hf, loss_of, modular, run_step, seeded
from tests.zoo.modular import Built

CPU = torch.device("cpu")
#: A fast link of known rates: moving beats computing again.
FAST = {"d2h_bytes_per_s": 1e12, "h2d_bytes_per_s": 1e12}
CASES = {case.name: case.make for case in hf.CASES if case.name != "mixtral-batched-mm"}


@pytest.fixture(autouse=True)
def apart() -> Iterator[None]:
    yield
    close_shared_stores()


class Chain(nn.Sequential):
    """Layers, some of them random, and a loss."""

    def __init__(self, layers: int = 4) -> None:
        width = 48
        parts = (nn.Linear(width, width), nn.GELU(), nn.Dropout(0.2), nn.LayerNorm(width))
        super().__init__(*(layer for _ in range(layers) for layer in parts[:3]), parts[3])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = super().forward(x)
        return found.square().mean()


def chain() -> Built:
    torch.manual_seed(0)
    return Chain(), (torch.randn(96, 48),)


def least_of(module: nn.Module, inputs: tuple[Any, ...], **options: Any) -> int:
    torch._dynamo.reset()
    backend = ckpt_pass.make_backend(budget=1, **options)
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(module, backend=backend)(*inputs)
    torch._dynamo.reset()
    found = caught.value.inner_exception
    assert isinstance(found, ckpt_pass.InfeasibleBudgetError)
    return found.least_feasible_bytes


def check_met(make: Callable[[], Built], budget: int, offload: Offload, moves: bool = True) -> None:
    module, inputs = make()
    # Random numbers are the graph's own with inductor: they are those of its plain step.
    torch._dynamo.reset()
    plain = run_step(module, inputs, torch.compile(module, backend="inductor"))
    torch._dynamo.reset()
    module, inputs = make()
    backend = ckpt_pass.make_backend(budget=budget, offload=offload)
    compiled = torch.compile(module, backend=backend)
    ours = run_step(module, inputs, compiled)
    torch.testing.assert_close(ours.loss, plain.loss)
    for name, gradient in plain.gradients.items():
        torch.testing.assert_close(ours.gradients[name], gradient, msg=name)
    plan = backend.plans[-1]
    assert plan.with_fate("offloaded") or not moves
    measured = ckpt_pass.measure_step(
        lambda: loss_of(compiled(*inputs)), repeats=1, params=module.parameters()
    )
    assert measured.peak_bytes == plan.peak_bytes <= budget
    gc.collect()
    assert store_for(offload, CPU).used_bytes == 0


@pytest.mark.slow
def test_a_budget_that_recomputation_alone_cannot_meet() -> None:
    """Chains of wide layers: what their backward reads at once is what is left without moves."""
    module, inputs = chain()
    disk = Offload(to="disk", **FAST)
    without, least = least_of(module, inputs), least_of(module, inputs, offload=disk)
    assert least < without
    check_met(chain, (least + without) // 2, disk)


def test_a_policy_and_a_store_of_ones_own() -> None:
    """What is being copied is written over by nobody: the store is slow to read it."""

    class InTurn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return x.square().mean()

    torch.manual_seed(0)
    module, inputs = InTurn(), (torch.randn(64, 64),)
    plain = run_step(module, inputs)
    store = host_store()
    policy = ckpt_pass.offload(op="aten.tanh") | ckpt_pass.recompute()
    backend = ckpt_pass.make_backend(policy, offload=store)
    compiled = torch.compile(module, backend=backend)
    taken = []
    for _ in range(4):
        ours = run_step(module, inputs, compiled)
        for name, gradient in plain.gradients.items():
            torch.testing.assert_close(ours.gradients[name], gradient, msg=name)
        taken.append(store.allocated_bytes)
    assert len(backend.plans[-1].with_fate("offloaded")) == 5
    assert taken[0] == taken[-1] > 0
    assert store.used_bytes == 0


@pytest.mark.slow
def test_copies_run_behind_what_the_plan_says() -> None:
    """Inductor's order for the least memory would wait for each copy as soon as it has begun."""
    torch.manual_seed(0)
    module, x = Chain(), torch.randn(96, 48)
    slow = Offload(d2h_bytes_per_s=4e8, h2d_bytes_per_s=4e8)
    torch._dynamo.reset()
    backend = ckpt_pass.make_backend(budget=0.7, offload=slow)
    compiled = torch.compile(module, backend=backend)
    _, (forward, _) = run_and_get_code(lambda: loss_of(compiled(x)).backward())
    assert backend.plans[-1].with_fate("offloaded")
    call = r"\b(put|release)\.default\((?:buf\d+, )?(buf\d+)|^ +(cpp_fused|extern)"
    calls = re.findall(call, forward, re.MULTILINE)
    at = {call: place for place, call in enumerate(calls) if call[0]}
    waits = [
        at["release", value, ""] - place for (op, value, _), place in at.items() if op == "put"
    ]
    assert max(waits) > 2, waits


@pytest.mark.slow
def test_values_lie_as_the_backward_reads_them() -> None:
    """Inductor would keep the copies of turned values as they lie in the making."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            turned = (layer(x).view(2, 8, 4, 4).transpose(1, 2) for layer in self.read)
            q, k, v = (value.contiguous() for value in turned)
            found = (q @ k.mT).softmax(-1) @ v
            return found.transpose(1, 2).reshape(2, 8, 16).square().mean()

    torch.manual_seed(0)
    module, inputs = Attention(), (torch.randn(2, 8, 16),)
    plain = run_step(module, inputs)
    policy = ckpt_pass.offload(min_bytes=1) | ckpt_pass.recompute()
    backend = ckpt_pass.make_backend(policy, offload=Offload(**FAST))
    ours = run_step(module, inputs, torch.compile(module, backend=backend))
    assert backend.plans[-1].with_fate("offloaded")
    for name, gradient in plain.gradients.items():
        torch.testing.assert_close(ours.gradients[name], gradient, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("part", [0.05, 0.3])
@pytest.mark.parametrize("name", [*CASES, "unet"])
def test_models(name: str, part: float) -> None:
    make = {**CASES, "unet": seeded(modular.unet)}[name]
    link = Offload(to="host", **FAST)
    module, inputs = make()
    least = least_of(module, inputs, offload=link)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="inductor")
    plain = ckpt_pass.measure_step(
        lambda: loss_of(compiled(*inputs)), repeats=1, params=module.parameters()
    )
    # Near the least, plans that move nothing may be the only ones that inductor keeps to.
    budget = least + int(part * (plain.peak_bytes - least))
    check_met(make, budget, link, moves=part > 0.05)
