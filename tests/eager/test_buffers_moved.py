"""Eager plans of modules that overwrite their buffers, and of ops that depend on data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver, get_default_qat_qconfig
from torch.ao.quantization import prepare_qat as prepared_for_quantisation

import ckpt_pass
from ckpt_pass.eager.prediction import predictor
from ckpt_pass.regions.wrapping import RegionSpec, applied_regions

LAYERS, WIDTH, ROWS, KEYS = 4, 32, 128, 256


class Layer(nn.Module):
    """Two products, and a buffer that is as large as an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.act: nn.Module = nn.GELU()
        self.register_buffer("keys", torch.zeros(KEYS, WIDTH))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))
        self.keys: Tensor
        self.place: Tensor

    def body(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.down(self.act(self.up(x)))
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Averages(Layer):
    """Reads what it has moved."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        self.keys.mul_(0.9).add_(x.detach().mean(0) * 0.1)
        return x * self.keys.mean(0)


class Looks(Layer):
    """Reads a buffer before it moves it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        keys = self.keys.clone()
        x = x + (x @ keys.t()).softmax(-1) @ keys
        self.keys.mul_(0.9).add_(x.detach().mean(0) * 0.1)
        return x


class Queues(Layer):
    """A queue of keys, whose place is a number that Python asks for."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        place = int(self.place)
        self.keys[place : place + 64] = x.detach()[:64]
        self.place.copy_((self.place + 64) % KEYS)
        keys = self.keys.clone()
        return x + (x @ keys.t()).softmax(-1) @ keys


class Routes(Layer):
    """Some rows go through the layer once more: how many depends on the data."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        rows = (x.sum(1) > 0).nonzero().squeeze(1)
        return x.index_add(0, rows, self.body(x[rows]))


class Asks(Layer):
    """Python asks for a value of the activations."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return x * 2 if x.mean().item() > -100 else x


class Observed(Layer):
    def __init__(self) -> None:
        super().__init__()
        observed = FakeQuantize(MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
        self.act = nn.Sequential(nn.GELU(), observed)


class Net(nn.Module):
    def __init__(self, kind: type[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def quantised() -> nn.Module:
    model = Net(Layer).train()
    model.qconfig = get_default_qat_qconfig("fbgemm")
    found: nn.Module = prepared_for_quantisation(model)
    return found


def warm(model: nn.Module, x: Tensor) -> nn.Module:
    """Observers size their buffers in a first step."""
    model(x).backward()
    model.zero_grad()
    return model


KINDS = [Averages, Looks, Queues, Routes, Asks, Observed]


@pytest.mark.parametrize("kind", [*KINDS, None])
def test_layers_are_regions(kind: type[Layer] | None) -> None:
    x = torch.randn(ROWS, WIDTH)
    model = warm(quantised() if kind is None else Net(kind), x)
    names = [f"layers.{number}" for number in range(LAYERS)]
    predicted = predictor(model, (x,)).predict([([name], None) for name in names])
    with applied_regions(model, dict.fromkeys(names, RegionSpec())):
        step = ckpt_pass.measure_step(lambda: model(x), repeats=1)
    assert predicted is not None
    # A bias's gradient, and numbers of Python's.
    assert 0 <= predicted.peak_bytes - step.peak_bytes <= 4 * (WIDTH + 2 * LAYERS)


@pytest.mark.parametrize("kind", [*KINDS, None])
def test_budgets_and_gradients(kind: type[Layer] | None) -> None:
    x = torch.randn(ROWS, WIDTH)
    model = warm(quantised() if kind is None else Net(kind), x)
    plain = ckpt_pass.plan(model, x, budget=1.0, mode="eager").peak_bytes
    with pytest.raises(ckpt_pass.InfeasibleBudgetError) as caught:
        ckpt_pass.plan(model, x, budget=1, mode="eager")
    least = caught.value.least_feasible_bytes
    assert least < 0.85 * plain
    for share in (0.0, 0.5):
        plan = ckpt_pass.plan(model, x, budget=int(least + share * (plain - least)), mode="eager")
        checked = ckpt_pass.verify(model, x, plan=plan)
        assert checked.ok, checked


class Reads(Layer):
    """Reads a buffer, its own or one that it is given, which it overwrites then."""

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        x = self.body(x)
        read = (self.keys if keys is None else keys).clone()
        x = x + (x @ read.t()).softmax(-1) @ read
        if keys is not None:
            keys.mul_(0.9).add_(x.detach().mean(0) * 0.1)
        return x


class Shares(Net):
    """Overwrites what its layers have read, or hands a buffer of its own to all of them."""

    def __init__(self, hands_in: bool) -> None:
        super().__init__(Reads)
        self.hands_in = hands_in
        self.register_buffer("keys", torch.ones(KEYS, WIDTH))
        self.keys: Tensor

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, self.keys) if self.hands_in else layer(x)
            if not self.hands_in:
                layer.keys.mul_(0.9).add_(x.detach().mean(0) * 0.1)
        return x.square().mean()


@pytest.mark.parametrize("hands_in", [False, True])
def test_what_others_overwrite_is_read_by_no_region(hands_in: bool) -> None:
    model, x = Shares(hands_in), torch.randn(ROWS, WIDTH)
    with pytest.raises(ckpt_pass.InfeasibleBudgetError, match="overwrites a buffer") as caught:
        ckpt_pass.plan(model, x, budget=1, mode="eager")
    plan = ckpt_pass.plan(model, x, budget=caught.value.least_feasible_bytes, mode="eager")
    checked = ckpt_pass.verify(model, x, plan=plan)
    assert checked.ok, checked


def test_a_buffer_that_is_still_empty() -> None:
    x = torch.randn(ROWS, WIDTH)
    with pytest.raises(ckpt_pass.InfeasibleBudgetError, match="plan after a first step"):
        ckpt_pass.plan(quantised(), x, budget=1, mode="eager")
