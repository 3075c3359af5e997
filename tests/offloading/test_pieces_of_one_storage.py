"""Tensors that lie in one storage, each with a version counter of its own.

``unsafe_chunk`` makes such pieces, in the kernels of LSTMs and GRUs; their activations are then
written in place, piece by piece.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass
from ckpt_pass.offloading.layout import counted_part
from ckpt_pass.offloading.stores import host_store
from tests.regions.test_offload import same

PLACES = (
    ckpt_pass.Offload(min_bytes=1),
    ckpt_pass.Offload("disk", min_bytes=1),
    host_store(bytes_per_s=1e6),
)


class Gates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.product = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        one, two, three = self.product(x).unsafe_chunk(3, -1)
        one.sigmoid_()
        two.tanh_()
        three.sigmoid_()
        return one * two + three * x * one


class Over(nn.Module):
    """A recurrent cell over a sequence, or a whole layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.inner, nn.RNNCellBase):
            return self.inner(x)[0]  # type: ignore[no-any-return]
        state = x.new_zeros(x.shape[1], 8)
        both = (state, state.clone()) if isinstance(self.inner, nn.LSTMCell) else state
        out = []
        for piece in x:
            both = self.inner(piece, both)
            out.append(both[0] if isinstance(both, tuple) else both)
        return torch.stack(out)


MODELS: dict[str, Any] = {
    "gates": Gates,
    "gru": lambda: Over(nn.GRU(8, 8)),
    "lstm": lambda: Over(nn.LSTM(8, 8)),
    "gru cell": lambda: Over(nn.GRUCell(8, 8)),
    "lstm cell": lambda: Over(nn.LSTMCell(8, 8)),
}
RULES = ckpt_pass.offload(op_class="pointwise") | ckpt_pass.recompute()


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Sequential:
    torch.manual_seed(0)
    parts = (nn.Sequential(nn.Linear(8, 8), MODELS[request.param]()) for _ in range(2))
    return nn.Sequential(*parts).double()  # in double precision no LSTM is a kernel of its own


X = torch.randn(4, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, run: Any) -> list[Tensor]:
    model.zero_grad()
    loss = run(X).square().sum()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("place", PLACES, ids=["host", "disk", "slow"])
def test_what_autograd_saves(model: nn.Sequential, place: Any) -> None:
    wanted = gradients(model, model)
    for in_flight in (0, 1, 5):

        def hooked(x: Tensor, in_flight: int = in_flight) -> Tensor:
            with ckpt_pass.offload_activations(model, place, in_flight=in_flight):
                return model(x)  # type: ignore[no-any-return]

        assert same(gradients(model, hooked), wanted), in_flight
    saved = ckpt_pass.Offloaded(ckpt_pass.AllLayers(), place, what="saved")
    with ckpt_pass.applied(model, saved):
        assert same(gradients(model, model), wanted)


@pytest.mark.parametrize("place", PLACES, ids=["host", "disk", "slow"])
def test_rules(model: nn.Sequential, place: Any) -> None:
    wanted = gradients(model, model)
    with ckpt_pass.applied(model, "all", RULES, offload=place, offload_inputs=True):
        assert same(gradients(model, model), wanted)


def test_pieces_as_inputs_of_regions() -> None:
    """The second piece is written to when the first has gone, with as many changes."""
    x = torch.randn(6, 8, requires_grad=True)

    def fn(around: Any) -> Tensor:
        one, two = torch.mul(x, 2).unsafe_chunk(2, -1)
        one = around(torch.sin, one.exp_())
        two = around(torch.cos, two.exp_())
        return (one * two).sum()

    def around(fn: Any, v: Tensor) -> Tensor:
        return ckpt_pass.checkpoint(fn, v, offload=PLACES[0], offload_inputs=True)  # type: ignore[no-any-return]

    wanted = torch.autograd.grad(fn(lambda fn, v: fn(v)), x)
    assert same(list(torch.autograd.grad(fn(around), x)), list(wanted))


def test_which_tensors_share_a_counter() -> None:
    whole = torch.zeros(4, 6)
    views = (whole, whole.t(), whole[1:, 2:], whole.detach(), whole.view(24)[3:])
    assert {counted_part(tensor) for tensor in views} == {None}
    pieces = [*whole.unsafe_chunk(3, 1), *whole.unsafe_chunk(3, 0)]
    assert None not in map(counted_part, pieces)
    assert len(set(map(counted_part, pieces))) == len(pieces)
    assert counted_part(pieces[0][1:]) == counted_part(pieces[0])
    assert counted_part(torch.zeros(0, 3)) is None
