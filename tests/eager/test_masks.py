"""Eager plans of steps that write by masks, or pack sequences: their shapes depend on values."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import ckpt_pass

ROWS, WIDTH = 64, 16


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.write(x, self.down(torch.nn.functional.gelu(self.up(x))))

    def write(self, x: Tensor, h: Tensor) -> Tensor:
        return h


class Routed(Layer):
    """Rows go to where a mask says, if there are any."""

    def write(self, x: Tensor, h: Tensor) -> Tensor:
        found, chosen = torch.zeros_like(x), h.mean(-1) > 0
        if chosen.any():
            found[chosen] = h[chosen] * 2
        return found


class Written(Layer):
    """No value is looked at before the backward."""

    def write(self, x: Tensor, h: Tensor) -> Tensor:
        found = x * 2
        found[:, (h.mean(0) > 0)] = 0.5
        return found + h.masked_scatter(h > 0.1, x.abs())


class Summed(Layer):
    def write(self, x: Tensor, h: Tensor) -> Tensor:
        return h * (1 + h[h > 0].mean()) + h.masked_select(h < 0).sum()


class Scattered(Layer):
    """As many values as an expanded mask chooses."""

    def write(self, x: Tensor, h: Tensor) -> Tensor:
        rows = h.mean(-1) > 0
        return torch.zeros_like(x).masked_scatter(
            rows[:, None].expand_as(x), self.up(h[rows])[:, :WIDTH]
        )


class Unique(Layer):
    """Few values come of many."""

    def write(self, x: Tensor, h: Tensor) -> Tensor:
        many = h.detach().repeat(8, 8)
        return h * len(torch.unique((many * 2).round()))


class Close(Layer):
    """All values are compared, and one answer comes of it."""

    def write(self, x: Tensor, h: Tensor) -> Tensor:
        many = h.detach().repeat(8, 8)
        return h * 2 if torch.allclose(many, many + 1e-9) else h


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(WIDTH, WIDTH, batch_first=True), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.tensor([12, 3, 7, 16])
        rows = x.view(4, 16, WIDTH)
        packed = pack_padded_sequence(rows, lengths, batch_first=True, enforce_sorted=False)
        return self.head(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("build", [Routed, Written, Summed, Scattered, Unique, Close])
def test_the_backward_chooses_as_much_as_the_forward_wrote(build: type[Layer]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(build() for _ in range(3))), torch.randn(ROWS, WIDTH)
    expected = gradients(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = ckpt_pass.plan(
            model, x, budget=1.0, mode="eager", loss_fn=lambda out: out.square().mean()
        )
    step = ckpt_pass.measure_step(lambda: model(x).square().mean(), repeats=1)
    assert plan.peak_bytes is not None
    assert 0 <= plan.peak_bytes - step.peak_bytes <= 0.01 * step.peak_bytes
    with plan.applied(model):
        assert all(map(torch.equal, gradients(model, x), expected))


def test_packed_sequences_have_the_lengths_that_are_given() -> None:
    torch.manual_seed(0)
    model, x = Packed(), torch.randn(ROWS, WIDTH)
    plan = ckpt_pass.plan(
        model, x, budget=1.0, mode="eager", loss_fn=lambda out: out.square().mean()
    )
    step = ckpt_pass.measure_step(lambda: model(x).square().mean(), repeats=1)
    assert plan.peak_bytes == step.peak_bytes
