"""Eager plans: the measured peak keeps to the budget, the prediction holds, gradients are equal."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass
from ckpt_pass.planner.eager_parts import EagerPlan
from ckpt_pass.planner.eager_solve import EagerPool
from tests.zoo import hf

LARGE: dict[str, Callable[[], Any]] = {"gpt2-12L": hf.gpt2_12l, "llama-16L": hf.llama_16l}
#: In every run; all of them are among the slow tests.
SOME = ("gpt2", "mixtral", "resnet")
some_models = pytest.mark.parametrize(
    "name", [n if n in SOME else pytest.param(n, marks=pytest.mark.slow) for n in hf.MODELS]
)
every_model = pytest.mark.parametrize("name", hf.MODELS)


def eager(model: nn.Module, args: tuple[Any, ...], budget: Any) -> ckpt_pass.Plan:
    return ckpt_pass.plan(model, *args, budget=budget, mode="eager")


def least_of(model: nn.Module, args: tuple[Any, ...]) -> int:
    with pytest.raises(ckpt_pass.InfeasibleBudgetError) as caught:
        eager(model, args, 1)
    return caught.value.least_feasible_bytes


def check_budgets(make: Callable[[], Any], count: int) -> None:
    """Measured peaks at ``count`` budgets, from the least feasible to no recomputation."""
    model, args = make()
    least = least_of(model, args)
    plain = eager(model, args, 1.0)
    assert plain.recompute_time_s == 0 and not plain.regions
    times = []
    for step in range(count):
        budget = least + (plain.peak_bytes - least) * step // (count - 1)
        plan = eager(model, args, budget)
        with plan.applied(model):
            measured = ckpt_pass.measure_step(lambda: model(*args), repeats=1)
        assert measured.peak_bytes <= budget, step
        assert abs(measured.peak_bytes - plan.peak_bytes) <= 0.01 * measured.peak_bytes, step
        assert measured.flops == plan.step_flops + plan.recompute_flops
        times.append(plan.recompute_time_s)
    assert times == sorted(times, reverse=True)


@some_models
def test_budgets_are_met(name: str) -> None:
    check_budgets(hf.MODELS[name], 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*hf.MODELS, *LARGE])
def test_ten_budgets_are_met(name: str) -> None:
    check_budgets((hf.MODELS | LARGE)[name], 10)


@every_model
@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_gradients_are_bitwise_equal(name: str, fraction: float) -> None:
    model, args = hf.MODELS[name]()
    least = least_of(model, args)
    budget = int(least + fraction * (eager(model, args, 1.0).peak_bytes - least))
    plan = eager(model, args, budget)
    assert plan.regions

    def planned() -> Tensor:
        with plan.applied(model):
            loss: Tensor = model(*args)
        return loss

    # The module itself is given, so that its buffers are compared, too.
    ckpt_pass.compare_gradients(lambda: model(*args), planned, model).raise_if_different()


CASES = {case.name: case for case in hf.CASES}


@pytest.mark.parametrize(
    "name",
    [n if n in ("gpt2", "resnet") else pytest.param(n, marks=pytest.mark.slow) for n in hf.MODELS],
)
def test_least_peak_is_not_above_a_checkpoint_for_each_block(name: str) -> None:
    check_least_peak(hf.MODELS[name], CASES[name].block_names)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_least_peak_of_a_large_model(name: str) -> None:
    check_least_peak(LARGE[name], CASES[name.partition("-")[0]].block_names)


def check_least_peak(
    make: Callable[[], Any], block_names: Callable[[nn.Module], list[str]]
) -> None:
    model, args = make()
    least = eager(model, args, least_of(model, args))
    with least.applied(model):
        ours = ckpt_pass.measure_step(lambda: model(*args), repeats=1)
    hf.checkpoint_blocks(model, block_names(model))
    torchs = ckpt_pass.measure_step(lambda: model(*args), repeats=1, params=model.parameters())
    assert ours.peak_bytes <= torchs.peak_bytes


def test_a_plan_is_the_same_every_time() -> None:
    model, args = hf.llama()
    assert eager(model, args, 0.6) == eager(model, args, 0.6)


def test_applying_changes_no_state() -> None:
    model, args = hf.gpt2()
    keys = list(model.state_dict())
    plan = eager(model, args, 0.6)
    with plan.applied(model):
        assert list(model.state_dict()) == keys
        with pytest.raises(ckpt_pass.AlreadyAppliedError, match="already"):
            plan.apply(model)
        again = pickle.loads(pickle.dumps(model))
        assert torch.equal(again(*args), model(*args)) or model.training
    assert all("forward" not in module.__dict__ for module in model.modules())
    with pytest.raises(ckpt_pass.NotAppliedError, match="nothing to remove"):
        plan.remove(model)


def test_a_plan_for_another_model_is_refused_whole() -> None:
    model, args = hf.gpt2()
    other, _ = hf.llama()
    plan = eager(model, args, 0.6)
    with pytest.raises(ckpt_pass.UnknownRegionError, match="has no module"):
        plan.apply(other)
    assert all("forward" not in module.__dict__ for module in other.modules())


def test_what_an_eager_plan_does_not_take() -> None:
    model, args = hf.gpt2()
    with pytest.raises(ckpt_pass.PlanModeError, match="without a budget"):
        ckpt_pass.plan(model, *args, mode="eager")
    with pytest.raises(ckpt_pass.PlanModeError, match="policy"):
        ckpt_pass.plan(model, *args, mode="eager", budget=0.5, policy="save-matmul")
    with pytest.raises(ckpt_pass.PlanModeError, match="expected one of"):
        ckpt_pass.plan(model, *args, mode="egaer", budget=0.5)
    with pytest.raises(ckpt_pass.InvalidBudgetError):
        ckpt_pass.plan(model, *args, mode="eager", budget="6 giraffes")


class _LooksAtValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).sum()
        return y if y.item() > 0 else -y


def test_a_model_that_looks_at_activations() -> None:
    plan = eager(_LooksAtValues(), (torch.randn(2, 4),), 1.0)
    assert any(decision.site.op.startswith("aten.") for decision in plan.decisions)


class _Averaging(nn.Module):
    """Saves a buffer that it has written to, and looks at values: its forward runs for real."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("mean", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        with torch.no_grad():
            self.mean.mul_(0.9)
        if h.sum().item() > 1e9:
            h = h * 2
        return (h * self.mean).square().mean()


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_a_step_that_is_under_way_goes_on(mode: Any) -> None:
    torch._dynamo.reset()
    model, x = _Averaging(), torch.randn(4, 8)
    loss = model(x)
    mean, version = model.mean.clone(), model.mean._version
    ckpt_pass.plan(model, x, budget="1GiB", mode=mode)
    assert torch.equal(model.mean, mean) and model.mean._version == version
    loss.backward()


def test_a_plan_without_regions_is_taken_away_too() -> None:
    model, x = nn.Linear(8, 8), torch.randn(4, 8)
    plan = ckpt_pass.plan(model, x, budget="1GiB", mode="eager", loss_fn=torch.sum)
    assert not plan.region_specs()
    plan.apply(model)
    plan.remove(model)


def test_nothing_to_differentiate() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ckpt_pass.NothingToDifferentiateError):
        ckpt_pass.plan(
            model, torch.randn(2, 2), budget=0.5, mode="eager", loss_fn=lambda out: out.sum()
        )


def test_planning_leaves_everything_as_it_was() -> None:
    model, args = hf.resnet()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    eager(model, args, 0.99)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_frontier_holds_the_best_of_all_simulated_plans() -> None:
    from ckpt_pass.eager.describe import eager_problem
    from ckpt_pass.eager.trace import trace_step

    model, args = hf.gpt2()
    problem = eager_problem(trace_step(model, args, None), {}, {})
    pool = EagerPool(problem)
    frontier = pool.frontier()
    assert frontier[0][2] == EagerPlan()
    for time_s, peak in pool.plans.values():
        assert any(other <= time_s and bytes_ <= peak for other, bytes_, _ in frontier)


def test_a_plan_for_another_shape_or_dtype_says_what_differs() -> None:
    model, args = hf.gpt2()
    plan = eager(model, args, 0.6)
    (name, _), *_ = model.named_parameters()
    wider = copy.deepcopy(model)
    wider.get_parameter(name).data = torch.zeros(7, 48)
    for use in (plan.apply, plan.applied):
        with pytest.raises(ckpt_pass.PlanMismatchError) as caught:
            use(wider)
        assert f"parameters {name} float32[7, 48] here, {name} float32[128, 48] in the plan" in str(
            caught.value
        )
    with pytest.raises(ckpt_pass.PlanMismatchError, match=r"bfloat16\[.* and 37 more here"):
        plan.apply(copy.deepcopy(model).bfloat16())
    with pytest.raises(ckpt_pass.PlanMismatchError, match=r"arguments int64\[2, 32\] here"):
        ckpt_pass.verify(model, args[0][:2], plan=plan)
    assert all("forward" not in module.__dict__ for module in wider.modules())


def test_another_version_is_named_along_with_what_differs() -> None:
    model, args = hf.gpt2()
    plan = eager(model, args, 0.6)
    assert plan.signature is not None
    old = dataclasses.replace(plan.signature, torch_version="2.0.0", library_version="0.0.1")
    dated = dataclasses.replace(plan, execution=dataclasses.replace(plan.execution, signature=old))
    with dated.applied(model):  # by itself no reason to refuse
        pass
    found = ckpt_pass.plan_differences(plan, dated)
    assert [line.partition(":")[0] for line in found] == ["torch_version", "library_version"]
    with pytest.raises(
        ckpt_pass.PlanMismatchError, match=r"2\.0\.0 in the plan; ckpt_pass .* 0\.0\.1"
    ):
        dated.apply(copy.deepcopy(model).bfloat16())


def test_checkpoint_by_a_plan() -> None:
    """``checkpoint(plan=...)`` is a region where the plan has one, and a plain call elsewhere."""
    model, args = hf.gpt2()
    plan = eager(model, args, least_of(model, args))
    found = []
    for name, module in model.named_modules():
        if "forward" not in module.__dict__ and name in (*plan.regions, "model.lm_head"):
            own = module.forward
            module.forward = functools.partial(_by_plan, own, plan, name)
            found.append(module)
    measured = ckpt_pass.measure_step(lambda: model(*args), repeats=1)
    assert abs(measured.peak_bytes - plan.peak_bytes) <= 512
    with pytest.raises(ckpt_pass.UnknownRegionError, match=r"Did you mean 'model\.lm_head'"):
        ckpt_pass.checkpoint(torch.sin, torch.ones(2), plan=plan, name="model.lmhead")


def _by_plan(forward: Any, plan: ckpt_pass.Plan, name: str, *args: Any, **kwargs: Any) -> Any:
    return ckpt_pass.checkpoint(forward, *args, plan=plan, name=name, **kwargs)


class _Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Dropout(0.5), nn.Linear(64, 16))
            for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def test_dropout_that_is_switched_on_after_planning() -> None:
    """In evaluation the regions drew nothing; their random state is kept nevertheless."""
    model, x = _Dropping().eval(), torch.randn(256, 16)
    plan = eager(model, (x,), least_of(model, (x,)))
    assert plan.regions and plan.random_regions == set(plan.regions)
    model.train()

    def planned() -> Tensor:
        with plan.applied(model):
            loss: Tensor = model(x)
        return loss

    ckpt_pass.compare_gradients(lambda: model(x), planned, model).raise_if_different()


class _Counting(nn.Module):
    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.linear, self.counts = nn.Linear(32, 32), counts
        self.seen = torch.zeros(32)  # no buffer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.counts:
            self.seen.add_(1)
        return torch.tanh(self.linear(x))


class _Either(nn.Module):
    def forward(self, x: torch.Tensor, first: bool) -> torch.Tensor:
        return torch.tanh(x) if first else torch.sigmoid(x)


class _Refused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.act = _Counting(True), _Counting(False), _Either()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.act(self.second(self.act(self.first(x), True)), False).sum()
        return found


def test_a_refusal_names_what_cannot_be_a_region() -> None:
    why = r"Left out.*first \(aten\.add_\.Tensor in it has an effect\), act \(it is called 2 times,"
    with pytest.raises(ckpt_pass.InfeasibleBudgetError, match=why) as caught:
        ckpt_pass.plan(_Refused(), torch.randn(64, 32), budget=1, mode="eager")
    least = caught.value.least_feasible_bytes
    plan = ckpt_pass.plan(_Refused(), torch.randn(64, 32), budget=least, mode="eager")
    assert plan.peak_bytes <= least


class WritesIntoProducts(nn.Module):
    """All that takes time is written into later, so that no op of it may be kept."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 32)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        hidden[:, ::2].mul_(1.5)
        hidden[:, :32].add_(x)
        found: Tensor = x + self.down(hidden.tanh())
        return found


def test_regions_that_are_dearer_than_all_ops_that_may_be_kept() -> None:
    model, args = nn.Sequential(*(WritesIntoProducts() for _ in range(6))), (torch.randn(256, 32),)
    loss = torch.sum
    plain = ckpt_pass.plan(model, *args, budget=1.0, mode="eager", loss_fn=loss).peak_bytes
    plan = ckpt_pass.plan(model, *args, budget=0.6, mode="eager", loss_fn=loss)
    assert plan.regions and plan.peak_bytes <= 0.6 * plain
    with plan.applied(model):
        measured = ckpt_pass.measure_step(lambda: loss(model(*args)), repeats=1)
    assert abs(measured.peak_bytes - plan.peak_bytes) <= 64
