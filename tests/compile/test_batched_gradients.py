"""Compiled steps whose backward runs once for a batch of gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass

WAYS = {
    "saved": ckpt_pass.make_backend("save-everything", inner="aot_eager"),
    "recomputed": ckpt_pass.make_backend("save-nothing", inner="aot_eager"),
    "budget": ckpt_pass.make_backend(budget=0.8, inner="aot_eager"),
}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(nn.functional.silu(self.up(x))))


def jacobian(backend: object) -> tuple[Tensor, Tensor]:
    """Of a row, all at once; then a plain backward of the same graph."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, x = nn.Sequential(Layer(), Layer()), torch.randn(16, 8, requires_grad=True)
    y = (torch.compile(model, backend=backend) if backend else model)(x)
    (found,) = torch.autograd.grad(y[0], x, torch.eye(8), is_grads_batched=True, retain_graph=True)
    (plain,) = torch.autograd.grad(y.sum(), x)
    return found, plain


@pytest.mark.parametrize("way", WAYS)
def test_a_jacobian_at_once(way: str) -> None:
    found, expected = jacobian(WAYS[way]), jacobian(None)
    assert all(map(torch.equal, found, expected))
