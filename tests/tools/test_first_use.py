"""Steps that make what the next one finds: said when they are planned."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass

X = torch.randn(64, 16, 32)


_everywhere: Tensor | None = None


class Angles(nn.Module):
    """Keeps a table, as rotary embeddings do."""

    tables: ClassVar[dict[str, tuple[Tensor, int]]] = {}

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(32, 32), how
        if how == "none":
            self.table: Tensor | None = None
        elif how == "buffer":
            self.register_buffer("table", None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x) * self.kept())

    def kept(self) -> Tensor:
        global _everywhere
        if self.how == "class":
            if "cos" not in Angles.tables:
                Angles.tables["cos"] = torch.arange(32.0).cos(), 1
            return Angles.tables["cos"][0]
        if self.how == "global":
            if _everywhere is None:
                _everywhere = torch.arange(32.0).cos()
            return _everywhere
        missing = not hasattr(self, "table") if self.how == "missing" else self.table is None
        if missing:
            self.table = torch.arange(32.0).cos()
        assert self.table is not None
        return self.table


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    global _everywhere
    yield
    _everywhere = None
    Angles.tables.clear()


def model_of(how: str) -> nn.Module:
    class Loss(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.square().mean()

    return nn.Sequential(Angles(how), Angles(how), Loss())


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("none", r"0\.table and 1 more"),
        ("missing", r"0\.table and 1 more"),
        ("buffer", r"\['0'\]\._buffers\['table'\] and 1 more"),
        ("class", r"test_first_use\.Angles\.tables\['cos'\] where"),
        ("global", r"test_first_use\._everywhere where"),
    ],
)
def test_what_a_first_step_makes_is_told(how: str, told: str) -> None:
    """Once it is there the plan is of every further step."""
    model = model_of(how)
    with pytest.warns(ckpt_pass.FirstUseWarning, match=told):
        ckpt_pass.plan(model, X, budget=0.7)
    model(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = ckpt_pass.plan(model, X, budget=0.7)
    step = torch.compile(model, backend=ckpt_pass.make_backend(plan=plan, inner="aot_eager"))
    for _ in range(2):
        found = ckpt_pass.measure_step(lambda: step(X), params=model.parameters())
        assert found.peak_bytes == plan.peak_bytes


@pytest.mark.parametrize("how", ["none", "class", "global"])
def test_what_a_first_eager_step_makes_is_told(how: str) -> None:
    """Ops are told by how often they ran: those that are kept are others with the table there."""
    model = model_of(how)
    with pytest.warns(ckpt_pass.FirstUseWarning, match=r"bytes that its step makes \(0 aten\.\w+"):
        ckpt_pass.plan(model, X, budget=1.0, mode="eager")
    model(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = ckpt_pass.plan(model, X, budget=1.0, mode="eager")
    plan.apply(model)
    found = ckpt_pass.measure_step(lambda: model(X), params=model.parameters())
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


@pytest.mark.parametrize("mode", ["compiled", "eager"])
def test_what_is_only_written_is_no_other_step(mode: Literal["compiled", "eager"]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ckpt_pass.plan(Notes(), X, budget=1.0, mode=mode)


def test_buffers_that_are_there_and_written_are_no_first_use() -> None:
    """Dynamo knows of a module's buffers only what was asked for."""
    layer = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(32, 32))
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ckpt_pass.plan(model, X, budget=1.0)


def test_casts_that_autocast_keeps_around_a_plan_are_no_first_use() -> None:
    """They are there as long as the block: the plan's step is that of a block around it all."""
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(X).float().square().mean().backward()

    with warnings.catch_warnings(), torch.autocast("cpu", dtype=torch.bfloat16):
        warnings.simplefilter("error")
        plan = ckpt_pass.plan(
            model, X, budget=1.0, mode="eager", loss_fn=lambda out: out.float().square().mean()
        )
    found = ckpt_pass.measure_step(step, backward=False, params=model.parameters())
    assert found.peak_bytes == plan.peak_bytes
