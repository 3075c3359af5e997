"""Regions whose modules move state, under ``torch.compile``: moved once, read as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass


class Counting(nn.Module):
    """A number on the module: dynamo takes no region with side effects into a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.calls = nn.Linear(8, 8), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return (self.up(x) * self.calls).tanh()


class Assigning(nn.Module):
    """A buffer that is another tensor after each run."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.register_buffer("most", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x) / self.most
        self.most = h.detach().abs().max()
        return h.tanh()


class Overwriting(nn.Module):
    """A buffer that is overwritten: dynamo takes it into the graph, where torch recomputes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("scales", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x) + (1 / self.scales[0])
        with torch.no_grad():
            self.scales[:1].copy_(h.abs().max())
        return self.down(h.sin())


class Scaling(nn.Module):
    """Layers read a buffer that the step overwrites when they have run."""

    def __init__(self) -> None:
        super().__init__()
        self.by_hand = True
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.register_buffer("most", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            args = self.scaled, layer, x
            x = ckpt_pass.checkpoint(*args) if self.by_hand else self.scaled(layer, x)
        with torch.no_grad():
            self.most.copy_(x.abs().max())
        return x.square().mean()

    def scaled(self, layer: nn.Module, x: Tensor) -> Tensor:
        made: Tensor = (layer(x) + 1 / self.most).sin()
        return made


class Layers(nn.Module):
    def __init__(self, kind: type[nn.Module], by_hand: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(2))
        self.by_hand = by_hand

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = ckpt_pass.checkpoint(layer, x) if self.by_hand else layer(x)
        return x.square().mean()


def two_steps(model: nn.Module, step: Any) -> dict[str, Tensor | None]:
    x = torch.linspace(-1, 1, 32).reshape(4, 8)
    for _ in range(2):
        step(x).backward()
    return {**{n: p.grad for n, p in model.named_parameters()}, **dict(model.named_buffers())}


@pytest.mark.parametrize("by_hand", [False, True], ids=["applied", "by hand"])
@pytest.mark.parametrize("kind", [Counting, Assigning, Overwriting])
@pytest.mark.parametrize("backend", ["aot_eager", "ours"])
def test_state_moves_once(kind: type[nn.Module], by_hand: bool, backend: str) -> None:
    torch.manual_seed(0)
    model = Layers(kind, by_hand)
    plain = copy.deepcopy(model)
    plain.by_hand = False
    expected = two_steps(plain, plain)
    if not by_hand:
        ckpt_pass.apply(model, "all")
    ours = ckpt_pass.make_backend(policy="save-nothing", inner="aot_eager")
    compiled = torch.compile(model, backend=ours if backend == "ours" else backend)
    found = two_steps(model, compiled)
    torch.testing.assert_close(found, expected)
    assert all(layer.calls == 2 for layer in model.layers if isinstance(layer, Counting))


def test_what_moves_after_the_regions() -> None:
    torch.manual_seed(0)
    model = Scaling()
    plain = copy.deepcopy(model)
    plain.by_hand = False
    ours = ckpt_pass.make_backend(policy="save-nothing", inner="aot_eager")
    expected = two_steps(plain, plain)
    torch.testing.assert_close(two_steps(model, torch.compile(model, backend=ours)), expected)


def test_what_moves_stays_in_the_graph_where_it_is_a_tensor() -> None:
    model = Layers(Overwriting, by_hand=True)
    x = torch.ones(4, 8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x).backward()


def test_by_hand_in_many_models() -> None:
    """No guard is on what the library knows of other models, which may be gone."""
    for _ in range(4):
        torch._dynamo.reset()
        model = Layers(Overwriting, by_hand=True)
        torch.compile(model, backend="aot_eager")(torch.ones(4, 8)).backward()
