"""Saved values that an in-place op makes lie otherwise: their values are what they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import ckpt_pass
from tests.regions.test_offload import same

SMALL = ckpt_pass.Offload(min_bytes=1)
RESHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "unsqueeze": lambda y: y.unsqueeze_(1).squeeze_(1),
    "transpose": lambda y: y.transpose_(0, 1),
    "t": lambda y: y.t_(),
    "swapaxes": lambda y: y.swapaxes_(0, 1),
    "as_strided": lambda y: y.as_strided_((8, 4), (1, 8)),
    "and written to": lambda y: y.t_().mul_(2),
    "views of it": lambda y: y[1:].t_().reshape(8, -1) + y[:1].unsqueeze_(0).sum(),
}
WAYS: dict[str, Callable[..., Any]] = {
    "matmuls": lambda fn, x: ckpt_pass.checkpoint(fn, x, policy="save-matmul"),
    "all": lambda fn, x: ckpt_pass.checkpoint(fn, x, policy="save-everything"),
    "moved": lambda fn, x: ckpt_pass.checkpoint(fn, x, policy=ckpt_pass.offload(), offload=SMALL),
    "context_fn": lambda fn, x: torch_checkpoint(
        fn, x, use_reentrant=False, context_fn=ckpt_pass.context_fn("save-matmul")
    ),
}


class Net(nn.Module):
    def __init__(self, reshape: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.reshape = nn.Linear(8, 8), reshape

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.reshape(self.one(x))).exp().cumsum(0)


def gradients(net: nn.Module, run: Callable[[Tensor], Any]) -> list[Tensor]:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    loss = run(x).square().sum()
    return [loss.detach(), *torch.autograd.grad(loss, [x, *net.parameters()])]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reshape", RESHAPES)
def test_gradients(reshape: str, way: str) -> None:
    torch.manual_seed(0)
    net = Net(RESHAPES[reshape])
    assert same(gradients(net, lambda x: WAYS[way](net, x)), gradients(net, net))


@pytest.mark.parametrize("way", WAYS)
def test_recurrent_layers_transpose_their_output(way: str) -> None:
    torch.manual_seed(0)
    net = nn.GRU(8, 8, batch_first=True)

    def fn(x: Tensor) -> Tensor:
        return net(x.tanh()[None])[0].exp()  # type: ignore[no-any-return]

    assert same(gradients(net, lambda x: WAYS[way](fn, x)), gradients(net, fn))


def test_a_change_of_values_after_the_region_is_refused_all_the_same() -> None:
    net, kept = nn.Linear(8, 8), []

    def fn(x: Tensor) -> Tensor:
        kept.append(net(x))
        return torch.tanh(kept[-1].t_())

    out = WAYS["matmuls"](fn, torch.randn(4, 8))
    with torch.no_grad():
        kept[0].mul_(2)
    with pytest.raises(ckpt_pass.MutatedActivationError):
        out.sum().backward()
