"""Eager plans of modules that a step calls several times."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckpt_pass
from ckpt_pass.eager.prediction import predictor
from ckpt_pass.policy.named import as_policy
from ckpt_pass.regions.wrapping import RegionSpec, applied_regions

WIDTH, ROWS = 32, 128


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(WIDTH), nn.Dropout(0.2)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))
        return found


class Loops(nn.Module):
    """One layer, six times."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(6):
            x = self.block(x)
        return x.square().mean()


class Around(nn.Module):
    """Something of its own before a layer that others have, too."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.own, self.shared = Block(), shared

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.shared(self.own(x))
        return found


class Nested(nn.Module):
    """A layer that is called in two others, and alone."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = Block()
        self.first, self.second = Around(self.shared), Around(self.shared)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.shared(self.second(self.first(x))).square().mean()
        return found


class Turns(nn.Module):
    """Does something else each second time."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.scale = Block(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for turn in range(4):
            x = self._step(x, turn)
        return x.square().mean()

    def _step(self, x: Tensor, turn: int) -> Tensor:
        found: Tensor = self.block(x if turn % 2 else self.scale(x))
        return found


class BothWays(nn.Module):
    """Calls layers, and the forward of one of them, and of one that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.alone = Block()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        x = self.blocks[1].forward(x)
        return self.alone.forward(x).square().mean()


class Teaches(nn.Module):
    """Layers that run under ``no_grad`` first, and learn from what came out then."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            taught = self.blocks(x)
        return (self.blocks(x) - taught / 2).square().mean()


class AsksBetween(nn.Module):
    """A gradient of some layers is taken between them; the backward goes through them again."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == 2:
                asked = self.blocks[1].down.weight
                (found,) = torch.autograd.grad(x.sum(), asked, retain_graph=True)
                x = x + found.mean()
        return x.square().mean()


def least_bytes(model: nn.Module, x: Tensor) -> int:
    with pytest.raises(ckpt_pass.InfeasibleBudgetError) as caught:
        ckpt_pass.plan(model, x, budget=1, mode="eager")
    return caught.value.least_feasible_bytes


def check(model: nn.Module, x: Tensor, budget: int | float) -> ckpt_pass.Plan:
    """Carry a plan out: the gradients of the plain step, and the peak that is predicted."""
    plan = ckpt_pass.plan(model, x, budget=budget, mode="eager")
    assert ckpt_pass.verify(model, x, plan=plan).ok
    with plan.applied(model):
        found = ckpt_pass.measure_step(lambda: model(x), repeats=1)
    assert found.peak_bytes <= plan.budget_bytes  # type: ignore[operator]
    assert abs(found.peak_bytes - plan.peak_bytes) <= 0.01 * found.peak_bytes, plan.regions
    return plan


@pytest.mark.parametrize("kind", [Loops, Nested, Turns])
def test_what_is_called_several_times_runs_again_each_time(kind: type[nn.Module]) -> None:
    model, x = kind(), torch.randn(ROWS, WIDTH)
    plain = ckpt_pass.plan(model, x, budget=1.0, mode="eager").peak_bytes
    least = least_bytes(model, x)
    assert least < 0.5 * plain
    for share in (0.0, 0.5):
        plan = check(model, x, int(least + share * (plain - least)))
        assert len(set(plan.regions)) == len(plan.regions)
        inside = [n for n in plan.regions for m in plan.regions if n.startswith(f"{m}.")]
        assert not inside


@pytest.mark.parametrize("kind", [Teaches, AsksBetween])
@pytest.mark.parametrize("share", [0.0, 0.4, 0.8])
def test_what_else_runs_the_same_layers(kind: type[nn.Module], share: float) -> None:
    model, x = kind(), torch.randn(ROWS, WIDTH)
    plain = ckpt_pass.plan(model, x, budget=1.0, mode="eager").peak_bytes
    least = least_bytes(model, x)
    assert least < 0.8 * plain
    plan = check(model, x, int(least + share * (plain - least)))
    # What two backwards ask for is made again for none of them.
    assert kind is Teaches or not {"blocks.2", "blocks.1.down"} & set(plan.regions)


def test_layers_that_teach_are_predicted_by_hand() -> None:
    model, x = Teaches(), torch.randn(ROWS, WIDTH)
    names = [f"blocks.{number}" for number in range(4)]
    predicted = predictor(model, (x,)).predict([([name], None) for name in names])
    with applied_regions(model, dict.fromkeys(names, RegionSpec())):
        found = ckpt_pass.measure_step(lambda: model(x), repeats=1)
    assert predicted is not None
    assert abs(found.peak_bytes - predicted.peak_bytes) <= 0.01 * found.peak_bytes


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
def test_a_forward_that_is_called_alone_is_a_call(share: float) -> None:
    model, x = BothWays(), torch.randn(ROWS, WIDTH)
    plain = ckpt_pass.plan(model, x, budget=1.0, mode="eager").peak_bytes
    least = least_bytes(model, x)
    plan = check(model, x, int(least + share * (plain - least)))
    if share == 0.0:
        assert "blocks.1" in plan.regions
    for module in model.modules():
        assert "forward" not in vars(module)


def test_all_calls_keep_the_same(tmp_path: Path) -> None:
    model, x = Loops(), torch.randn(ROWS, WIDTH)
    plan = check(model, x, 0.75)
    assert any(kept.reason == "kept by its region" for kept in plan.saved)
    kept = [decision for decision in plan.decisions if decision.fate == "saved"]
    ops = [decision.site.op for decision in kept if decision.region == "block"]
    assert ops
    assert all(ops.count(op) % 6 == 0 for op in ops)
    again = ckpt_pass.Plan.load(plan.save(tmp_path / "plan.json"))
    assert ckpt_pass.verify(model, x, plan=again).ok


@pytest.mark.parametrize("policy", [None, "save-matmul"])
def test_each_call_of_a_region_by_hand_is_predicted(policy: str | None) -> None:
    model, x = Loops(), torch.randn(ROWS, WIDTH)
    predicted = predictor(model, (x,)).predict([(["block"], policy)])
    keeps = None if policy is None else as_policy(policy)
    with applied_regions(model, {"block": RegionSpec(policy=keeps)}):
        found = ckpt_pass.measure_step(lambda: model(x), repeats=1)
    assert predicted is not None
    assert abs(found.peak_bytes - predicted.peak_bytes) <= 0.01 * found.peak_bytes
