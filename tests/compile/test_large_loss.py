"""A loss over many classes: inductor makes one kernel of it, and writes little of it to memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import ckpt_pass
from tests.zoo import run_step


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 32), nn.Tanh())
        self.head = nn.Linear(32, 1000)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        logits = self.head(self.body(x)).float()
        return nn.functional.cross_entropy(logits, target)


def least(module: nn.Module, inputs: tuple[Tensor, ...], inner: str) -> int:
    torch._dynamo.reset()
    backend = ckpt_pass.make_backend(budget=1, inner=inner)  # type: ignore[arg-type]
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(module, backend=backend)(*inputs)
    error = caught.value.inner_exception
    assert isinstance(error, ckpt_pass.InfeasibleBudgetError)
    return error.least_feasible_bytes


def test_the_least_is_about_that_of_single_ops() -> None:
    """In bfloat16 the loss is computed in float32: one such copy of the logits is 1 MB."""
    torch.manual_seed(0)
    module = Classifier().to(torch.bfloat16)
    inputs = torch.randn(256, 32, dtype=torch.bfloat16), torch.randint(1000, (256,))
    logits_bytes = 256 * 1000 * 2
    found = least(module, inputs, "inductor")
    assert found <= least(module, inputs, "aot_eager") and found < 3.1 * logits_bytes
    plain = run_step(module, inputs)
    torch._dynamo.reset()
    backend = ckpt_pass.make_backend(budget=found, inner="inductor")
    compiled = torch.compile(module, backend=backend)
    measured = ckpt_pass.measure_step(lambda: compiled(*inputs), repeats=1).peak_bytes
    (plan,) = backend.plans
    assert measured == plan.peak_bytes <= found
    ours = run_step(module, inputs, compiled)
    torch.testing.assert_close(ours.loss, plain.loss)
    assert ours.gradients.keys() == plain.gradients.keys()
    for name, gradient in ours.gradients.items():
        torch.testing.assert_close(gradient, plain.gradients[name], rtol=0.02, atol=1e-4)
