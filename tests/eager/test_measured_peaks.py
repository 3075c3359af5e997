"""Peaks of eager plans, to the byte: own backwards, sparse gradients, numbers, late values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckpt_pass
from ckpt_pass.eager.prediction import predictor
from ckpt_pass.regions.wrapping import RegionSpec, applied_regions

WIDTH = 16


def least(model: nn.Module, *args: Tensor) -> ckpt_pass.Plan:
    """The plan with the lowest peak."""
    try:
        return ckpt_pass.plan(model, *args, budget=1, mode="eager")
    except ckpt_pass.InfeasibleBudgetError as error:
        found = error.least_feasible_bytes
    return ckpt_pass.plan(model, *args, budget=found, mode="eager")


def off(plan: ckpt_pass.Plan, model: nn.Module, *args: Tensor) -> int:
    """By how much the measured peak is above the predicted one."""
    with plan.applied(model) if plan.regions else contextlib.nullcontext():
        found = ckpt_pass.measure_step(lambda: model(*args), repeats=1)
    return found.peak_bytes - plan.peak_bytes


def check_exact(model: nn.Module, *args: Tensor) -> None:
    plans = ckpt_pass.plan(model, *args, budget=1.0, mode="eager"), least(model, *args)
    assert [off(plan, model, *args) for plan in plans] == [0, 0]


class Sums(torch.autograd.Function):
    """Two outputs; the backward adds to tensors that it has made, and needs them again."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(a, b)
        return a.exp(), a * b

    @staticmethod
    def backward(ctx: Any, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        start = torch.zeros_like(a)
        for_a, for_b = start + one * a.exp(), start + other * a
        return for_a + other * b, for_b + start


class Unread(torch.autograd.Function):
    """Saves what its backward does not look at."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x * 2)
        return x + 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "unread":
            return Unread.apply(self.fc(x).tanh()).sin()  # type: ignore[no-any-return]
        one, other = Sums.apply(self.fc(x), x.sin())
        return one.tanh() + other if self.kind == "two outputs" else other.tanh()


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(kind) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x).square().mean()


@pytest.mark.parametrize("kind", ["two outputs", "one of two outputs", "unread"])
def test_functions_with_a_backward_of_their_own(kind: str) -> None:
    torch.manual_seed(0)
    check_exact(Net(kind), torch.randn(64, WIDTH))


class Tables(nn.Module):
    """Rows of a sparse table, taken once or more often, beside rows chosen by lists."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times
        self.table = nn.Embedding(50, WIDTH, sparse=True)
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, numbers: Tensor) -> Tensor:
        found = sum(self.table(numbers + k) for k in range(self.times))
        assert isinstance(found, Tensor)
        fixed = self.table(torch.tensor([3, 1, 4, 1, 5] * 40))
        return self.fc(found.tanh())[[0, 2, 4] * 9].mean() + fixed.square().mean()


@pytest.mark.parametrize("times", [1, 3])
def test_sparse_tables_and_numbers_from_lists(times: int) -> None:
    torch.manual_seed(0)
    check_exact(Tables(times), torch.randint(0, 40, (60,)))


class Bags(nn.Module):
    """Rows of a table, one for each bag of numbers that the forward makes."""

    def __init__(self, mode: str, sparse: bool) -> None:
        super().__init__()
        self.bags = nn.EmbeddingBag(300, WIDTH, mode=mode, sparse=sparse)
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, numbers: Tensor) -> Tensor:
        return self.fc(self.bags(numbers * 2 + 1)).tanh().square().mean()


@pytest.mark.parametrize(
    ("mode", "sparse"), [("sum", True), ("mean", True), ("mean", False), ("max", False)]
)
def test_bags_of_rows(mode: str, sparse: bool) -> None:
    torch.manual_seed(0)
    check_exact(Bags(mode, sparse), torch.randint(0, 140, (24, 8)))


class Routed(nn.Module):
    """Experts, of which those are called that a mask of zeros has been told of."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        hits = torch.zeros(4, dtype=torch.long).index_add_(0, chosen, torch.ones_like(chosen))
        mask = F.one_hot(chosen, 4).bool()
        made = torch.zeros_like(x)
        for number in map(int, hits.nonzero()):
            rows = mask[:, number].nonzero().flatten()
            made = made.index_add(0, rows, self.experts[number](x[rows]).tanh())
        return made.square().mean()


def test_numbers_that_depend_on_values_are_not_those_that_were_there_before() -> None:
    torch.manual_seed(0)
    model, x = Routed(), torch.randn(64, WIDTH)
    plan = ckpt_pass.plan(model, x, budget=1.0, mode="eager")
    assert sum(decision.site.op == "aten.tanh.default" for decision in plan.decisions) > 1
    assert abs(off(plan, model, x)) <= 0.01 * plan.peak_bytes


class Attention(nn.Module):
    """Products that are kept and needed before the last op that runs again."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        query, keys, values = (part(x) for part in self.parts)
        weights = F.dropout((query @ keys.transpose(-1, -2)).softmax(-1), 0.1)
        return x + weights @ values


@pytest.mark.slow
def test_kept_outputs_go_with_the_recomputation() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(*(Attention() for _ in range(3)))

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x).square().mean()

    model, x = Loss(), torch.randn(4, 24, WIDTH)
    plain = ckpt_pass.plan(model, x, budget=1.0, mode="eager")
    lowest = least(model, x)
    for step in range(4):
        budget = lowest.peak_bytes + (plain.peak_bytes - lowest.peak_bytes) * step // 3
        plan = ckpt_pass.plan(model, x, budget=budget, mode="eager")
        assert abs(off(plan, model, x)) <= 16, plan.regions


def test_gradients_that_are_there_change_no_plan_and_need_no_more() -> None:
    torch.manual_seed(0)
    model, x = Net("two outputs"), torch.randn(64, WIDTH)
    without = least(model, x)
    model(x).backward()
    held = {name: p.grad for name, p in model.named_parameters()}
    assert least(model, x) == without
    assert all(p.grad is held[name] for name, p in model.named_parameters())

    with without.applied(model), ckpt_pass.MemoryProfiler() as profiler:
        model(x).backward()
    assert profiler.peak_bytes <= without.peak_bytes


class Kept:
    """What layers put away, for whoever asks."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []


class PutsAway(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, kept: Kept) -> Tensor:
        made = self.fc(x).tanh()
        kept.seen.append(made.detach().repeat(1, 4))
        return made.sin()


class Collecting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PutsAway() for _ in range(3))
        self.head = nn.Linear(WIDTH, 4 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self._through(x)).exp().square().mean()

    def _through(self, x: Tensor) -> Tensor:
        kept = Kept()
        for layer in self.layers:
            x = layer(x, kept)
        return x


def test_objects_that_regions_hold_keep_what_is_put_into_them() -> None:
    torch.manual_seed(0)
    model, x = Collecting(), torch.randn(64, WIDTH)
    names = ["layers.0", "layers.1", "layers.2"]
    predicted = predictor(model, (x,)).predict([((name,), None) for name in names])
    assert predicted is not None
    with applied_regions(model, {name: RegionSpec() for name in names}):
        found = ckpt_pass.measure_step(lambda: model(x), repeats=1)
    assert found.peak_bytes == predicted.peak_bytes


class ReadTwice(torch.autograd.Function):
    """Its backward asks for what is saved once for each value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.cos())
        return x.sin()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[1] + ctx.saved_tensors[0] * 0


class Mixed(nn.Module):
    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.twice, self.fc = twice, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        made = self.fc(x).tanh()
        return x + (ReadTwice.apply(made) if self.twice else made.sin().exp())


class Pieces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Mixed(k % 2 == 1) for k in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


def test_what_is_asked_twice_is_in_no_region() -> None:
    torch.manual_seed(0)
    model, x = Pieces(), torch.randn(64, WIDTH)
    plan = least(model, x)
    assert set(plan.regions) == {"layers.0", "layers.2"}
    assert off(plan, model, x) == 0


class Mixture(nn.Module):
    """Experts add into one output: its gradient is that of the residual, too, unchanged."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 64), nn.SiLU(), nn.Linear(64, width)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, places = torch.where(chosen == number)
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, places, None])
        return x + out


def test_a_gradient_that_two_places_hold_is_not_added_to_in_place() -> None:
    model, x = nn.Sequential(Mixture(), Mixture()), torch.randn(96, 32)

    def square(y: Tensor) -> Tensor:
        return y.square().mean()

    def planned(budget: Any) -> ckpt_pass.Plan:
        return ckpt_pass.plan(model, x, budget=budget, mode="eager", loss_fn=square)

    most = planned(1.0).peak_bytes
    with pytest.raises(ckpt_pass.InfeasibleBudgetError) as caught:
        planned(1)
    for part in (0.1, 0.2, 0.5):
        lowest = caught.value.least_feasible_bytes
        plan = planned(int(lowest + part * (most - lowest)))
        with plan.applied(model):
            measured = ckpt_pass.measure_step(lambda: square(model(x)), repeats=1).peak_bytes
        assert plan.regions and measured <= plan.peak_bytes <= 1.002 * measured


class Whitening(nn.Module):
    """The formulas of what is behind a Cholesky factor, or a pseudo-inverse, add."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.first, self.last = nn.Linear(48, 48), nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        found: Tensor = self.last(self.function(h)) * h
        return found.square().mean()


def _cholesky(h: Tensor) -> Tensor:
    found: Tensor = torch.linalg.cholesky(h @ h.T + torch.eye(len(h)))
    return found


def _best(h: Tensor) -> Tensor:
    return h.topk(24, 0).values.repeat(2, 1) + h.max(0).values


def _middle(h: Tensor) -> Tensor:
    return h - h.median() * h.gather(0, h.argsort(0))


@pytest.mark.parametrize(
    "function",
    [
        lambda h: h.exp().cumprod(0),
        lambda h: h.exp().prod(0) + h,
        lambda h: h * torch.linalg.slogdet(h)[1],
        _best,
        _middle,
    ],
    ids=["cumprod", "prod", "slogdet", "best", "middle"],
)
def test_formulas_that_go_another_way_on_fake_tensors(
    function: Callable[[Tensor], Tensor],
) -> None:
    torch.manual_seed(0)
    model, x = Whitening(function), torch.randn(48, 48)
    assert off(ckpt_pass.plan(model, x, budget=1.0, mode="eager"), model, x) == 0


@pytest.mark.parametrize("function", [_cholesky, torch.linalg.pinv], ids=["cholesky", "pinv"])
def test_what_formulas_add_is_allocated(function: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    check_exact(Whitening(function), torch.randn(48, 48))
