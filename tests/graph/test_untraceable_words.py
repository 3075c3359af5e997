"""What the error of a step that cannot be traced says would be right."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass


class Twice(nn.Module):
    """Its forward takes a gradient, of which the backward takes another."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.fc(x).tanh().sum(), x, create_graph=True)
        return gradient.square().mean()


class Transform(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.grad(lambda z: self.fc(z).tanh().sum())(x).square().mean()


class Wrong(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).missing


class Shapes(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.reshape(3, 4)).sum()


@pytest.mark.parametrize(
    ("build", "mode", "words"),
    [
        (Shapes, "compiled", r"is invalid for input of size 8.*try model\(\*args\) first"),
        (Shapes, "eager", r"is invalid for input of size 8.*try model\(\*args\) first"),
        (Twice, "compiled", "mode='eager'"),
        (Transform, "eager", "without mode='eager'"),
        (Wrong, "eager", r"try model\(\*args\) first"),
    ],
)
def test_the_cure_is_of_the_cause(build: type[Twice], mode: str, words: str) -> None:
    model, x = build(), torch.randn(2, 4)
    with pytest.raises(ckpt_pass.NotTraceableError, match=words):
        if mode == "eager":
            ckpt_pass.plan(model, x, budget=1.0, mode="eager")
        else:
            ckpt_pass.plan(model, x, budget=1.0)


@pytest.mark.parametrize("kind", ["scripted", "traced"])
def test_modules_of_torchscript_are_refused_in_eager_plans(kind: str) -> None:
    inner: nn.Module = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    x = torch.randn(2, 4)
    made = torch.jit.script(inner) if kind == "scripted" else torch.jit.trace(inner, x)
    model = nn.Sequential(nn.Linear(4, 4), made, nn.Linear(4, 1))
    hooks = len(nn.modules.module._global_forward_hooks)
    with pytest.raises(ckpt_pass.NotTraceableError, match="1 is a module of TorchScript"):
        ckpt_pass.plan(model, x, budget=1.0, mode="eager")
    assert all(p.grad is None for p in model.parameters())
    assert len(nn.modules.module._global_forward_hooks) == hooks
