"""Steps that return more than their loss: the training loop holds all of it, or the loss alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass


class Labelled(nn.Module):
    """Returns its loss and its logits, as Hugging Face's models do; cut in two, or not."""

    def __init__(self, is_cut: bool) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 256)
        self.is_cut = is_cut

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = x + self.narrow(torch.tanh(self.wide(x)))
        if self.is_cut:
            torch._dynamo.graph_break()
        logits = self.head(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(128, 32), torch.randint(0, 256, (128,))


def peak_with_all_held(model: nn.Module, forward: Any) -> int:
    given = batch()

    def step() -> Tensor:
        output = forward(*given)
        output["loss"].held = output["logits"]  # to the end of the step, no longer
        return output["loss"]  # type: ignore[no-any-return]

    leaves = list(model.parameters())
    return ckpt_pass.measure_step(step, params=leaves, warmup=1, repeats=1).peak_bytes


def loss_of(output: Mapping[str, Tensor]) -> Tensor:
    return output["loss"]


def test_around_inductor_what_the_loop_holds_is_counted() -> None:
    """The zeros that autograd makes for the logits go when the backward has read them."""
    torch._dynamo.reset()
    model = Labelled(is_cut=False)
    backend = ckpt_pass.make_backend(budget="2MiB", inner="inductor")
    measured = peak_with_all_held(model, torch.compile(model, backend=backend))
    assert measured == backend.plans[0].peak_bytes


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_of_several_graphs(inner: str) -> None:
    torch._dynamo.reset()
    model = Labelled(is_cut=True)
    plan = ckpt_pass.plan(model, *batch(), budget=1.0, inner=inner)
    assert isinstance(plan, ckpt_pass.StepPlan)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=ckpt_pass.make_backend(plan=plan))
    assert peak_with_all_held(model, compiled) == plan.peak_bytes


def test_eager() -> None:
    model = Labelled(is_cut=False)
    plan = ckpt_pass.plan(model, *batch(), budget=1.0, mode="eager")
    alone = ckpt_pass.plan(model, *batch(), budget=1.0, mode="eager", loss_fn=loss_of)
    given = batch()
    with plan.applied(model):
        assert peak_with_all_held(model, model) == plan.peak_bytes
        dropped = ckpt_pass.measure_step(lambda: loss_of(model(*given)), repeats=1).peak_bytes
    assert dropped == alone.peak_bytes == plan.peak_bytes - 128 * 256 * 4
