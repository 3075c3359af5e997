"""Numbers that autograd holds as tensors: 8 or 16 bytes each, where a gradient needs them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass


class Scaled(nn.Module):
    """Products and quotients by Python's numbers, in place too; half of them without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = torch.tanh(h * 1.5)
        h = torch.sin(h / 3)
        h *= 0.7
        h = h + 1
        h /= 1.25
        mask = x.sign().mul_(0.5).div_(2.0)
        mask = mask * 3 / 4
        with torch.no_grad():
            scale = h.detach().mul(2.0).div(5.0).mean()
        return (self.last(h + mask) * scale).square().mean()


def test_numbers_held_by_autograd() -> None:
    torch.manual_seed(0)
    model, x = Scaled(), torch.randn(64, 24)
    plan = ckpt_pass.plan(model, x, mode="eager", budget=1.0)
    plan.apply(model)
    measured = ckpt_pass.measure_step(lambda: model(x), repeats=1)
    assert measured.peak_bytes == plan.peak_bytes


def test_numbers_beside_conjugates_that_torch_makes_below_autograd() -> None:
    class Mirrored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weights = (torch.randn(16, 16, dtype=torch.cfloat) / 10 for _ in range(3))
            self.weights = nn.ParameterList(weights)

        def forward(self, x: Tensor) -> Tensor:
            z = torch.fft.fft(x)
            for weight in self.weights:
                z = z @ weight + z.conj() * 0.1
                z = z + z.conj().imag / 2
            return torch.view_as_real(z).square().mean()

    torch.manual_seed(0)
    model, x = Mirrored(), torch.randn(32, 16)
    plan = ckpt_pass.plan(model, x, mode="eager", budget=1.0)
    measured = ckpt_pass.measure_step(lambda: model(x), repeats=1)
    assert measured.peak_bytes == plan.peak_bytes


def test_complex_numbers_take_twice_as_much() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + (layer(x) * 0.1j).exp().real
            return x.square().mean()

    torch.manual_seed(0)
    model, x = Turned(), torch.randn(32, 16)
    plan = ckpt_pass.plan(model, x, mode="eager", budget=1.0)
    measured = ckpt_pass.measure_step(lambda: model(x), repeats=1)
    assert measured.peak_bytes == plan.peak_bytes


class _Again(torch.autograd.Function):
    """Runs a layer again in its backward, as reversible models do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        with torch.no_grad():
            found: Tensor = layer(x)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (saved,) = ctx.saved_tensors
        x = saved.detach().requires_grad_()
        with torch.enable_grad():
            found = ctx.layer(x)
        torch.autograd.backward(found, gradient)
        return x.grad, None


class Reversible(nn.Module):
    """The numbers of layers that the backward makes are held until these have been run back."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return _through(self.layers, x.tanh()).square().mean()


@torch.compiler.disable
def _through(layers: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in layers:
        x = _Again.apply(x, lambda h, layer=layer: torch.sin(layer(h * 1.5) * 0.5) / 3)
    return x


def test_numbers_held_by_graphs_of_the_backward() -> None:
    torch.manual_seed(0)
    model, x = Reversible(), torch.randn(64, 16).requires_grad_()
    eager = ckpt_pass.plan(model, x, mode="eager", budget=1.0)
    measured = ckpt_pass.measure_step(lambda: model(x), repeats=1)
    assert measured.peak_bytes == eager.peak_bytes
    plan = ckpt_pass.plan(model, x, budget=1.0)
    backend = ckpt_pass.make_backend(plan=plan, inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    measured = ckpt_pass.measure_step(lambda: compiled(x), repeats=1)
    assert measured.peak_bytes == plan.peak_bytes


class _Draws(nn.Module):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.bernoulli(torch.full_like(x, 0.9), generator=self.generator)
        return x + self.down(nn.functional.gelu(self.up(x * mask)))


def test_states_of_generators_that_regions_keep() -> None:
    torch.manual_seed(0)
    layers, x = nn.Sequential(*(_Draws() for _ in range(4))), torch.randn(256, 16)
    with pytest.raises(ckpt_pass.InfeasibleBudgetError) as refused:
        ckpt_pass.plan(layers, x, budget=16, mode="eager", loss_fn=torch.sum)
    least = refused.value.least_feasible_bytes
    plan = ckpt_pass.plan(layers, x, budget=least, mode="eager", loss_fn=torch.sum)
    assert plan.regions and plan.peak_bytes is not None
    with plan.applied(layers):
        step = ckpt_pass.measure_step(lambda: layers(x).sum(), repeats=1)
    assert 0 <= plan.peak_bytes - step.peak_bytes <= 128
