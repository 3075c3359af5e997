"""Offloading that only eager mode has, met by dynamo: it cuts the graph there, and is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import ckpt_pass
from tests.regions.test_offload import same

HOST = ckpt_pass.Offload(min_bytes=1)


class Recurrent(nn.Module):
    """Dynamo gives its forward up; what it calls there, it tries to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.product, self.cells = nn.Linear(8, 8), nn.GRU(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cells(torch.tanh(self.product(x)))[0]  # type: ignore[no-any-return]


class Cut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.one(x))
        torch._dynamo.graph_break()
        return x + self.two(y.exp()).sigmoid()


class Whole(Cut):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(torch.tanh(self.one(x)).exp()).sigmoid()


LAYERS: dict[str, Callable[[], nn.Module]] = {"gru": Recurrent, "cut": Cut, "whole": Whole}


@pytest.fixture(params=LAYERS)
def model(request: pytest.FixtureRequest) -> nn.Sequential:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return nn.Sequential(*(LAYERS[request.param]() for _ in range(2)))


X = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    model.zero_grad()
    loss = run(X).square().sum()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_what_autograd_saves(model: nn.Sequential) -> None:
    wanted = gradients(model, model)

    def hooked(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with ckpt_pass.offload_activations(model, HOST, in_flight=0):
            return run(x)

    inside = torch.compile(lambda x: hooked(model, x), backend="aot_eager")
    compiled = torch.compile(model, backend="aot_eager")
    for run in (inside, lambda x: hooked(compiled, x)):
        for _ in range(2):
            assert same(gradients(model, run), wanted)


PLACEMENTS: dict[str, Any] = {
    "inputs": {"offload": HOST, "offload_inputs": True},
    "saved": {"placement": ckpt_pass.Offloaded(ckpt_pass.AllLayers(), HOST, what="saved")},
}


@pytest.mark.parametrize("way", PLACEMENTS)
def test_regions(model: nn.Sequential, way: str) -> None:
    wanted = gradients(model, model)
    with ckpt_pass.applied(model, **{"placement": "all", **PLACEMENTS[way]}):
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(2):
            assert same(gradients(model, compiled), wanted)


def test_a_graph_without_cuts_is_refused() -> None:
    layer = Whole()

    def fn(x: Tensor) -> Tensor:
        return ckpt_pass.checkpoint(layer, x.sin(), offload=HOST, offload_inputs=True)  # type: ignore[no-any-return]

    with pytest.raises(Exception, match="offloads or shards its inputs, or what is saved"):
        torch.compile(fn, backend="aot_eager", fullgraph=True)(X)
    with pytest.raises(ckpt_pass.CompiledOffloadError, match="shard_inputs out, or trace"):
        make_fx(fn)(X)


def test_a_block_as_a_decorator_and_inside_itself() -> None:
    layer = Whole()
    wanted = gradients(layer, layer)
    block = ckpt_pass.offload_activations(layer, HOST)

    @block
    def hooked(x: Tensor) -> Tensor:
        with block:
            return layer(x)  # type: ignore[no-any-return]

    for _ in range(2):
        assert same(gradients(layer, hooked), wanted)
    assert not layer._forward_pre_hooks
