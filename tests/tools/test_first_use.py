"""Steps that make what the next one finds: said when they are planned."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass

X = torch.randn(64, 16, 32)


class Angles(nn.Module):
    """Keeps a table, as rotary embeddings do."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(32, 32), how
        if how == "none":
            self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        missing = not hasattr(self, "table") if self.how == "missing" else self.table is None
        if missing:
            self.table = torch.arange(32.0).cos()
        return torch.tanh(self.layer(x) * self.table)


def model_of(how: str) -> nn.Module:
    class Loss(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.square().mean()

    return nn.Sequential(Angles(how), Angles(how), Loss())


@pytest.mark.parametrize("how", ["none", "missing"])
def test_what_a_first_step_makes_is_told(how: str) -> None:
    """Once it is there the plan is of every further step."""
    model = model_of(how)
    with pytest.warns(ckpt_pass.FirstUseWarning, match=r"0\.table and 1 more"):
        ckpt_pass.plan(model, X, budget=0.7)
    model(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = ckpt_pass.plan(model, X, budget=0.7)
    step = torch.compile(model, backend=ckpt_pass.make_backend(plan=plan, inner="aot_eager"))
    for _ in range(2):
        found = ckpt_pass.measure_step(lambda: step(X), params=model.parameters())
        assert found.peak_bytes == plan.peak_bytes


class Notes(nn.Module):
    """Writes what it does not look at."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last, self.count = nn.Linear(32, 32), None, 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        x = self.layer(x)
        self.last = x.detach().mean()
        return x.square().mean()


def test_what_is_only_written_is_no_other_step() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ckpt_pass.plan(Notes(), X, budget=1.0)
