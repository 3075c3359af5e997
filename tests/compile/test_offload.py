"""Moves in compiled steps: right gradients, exact peaks, nothing left behind, clear refusals."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import CheckpointPolicy

import ckpt_pass
from ckpt_pass import Offload
from ckpt_pass.compile import engine, partition
from ckpt_pass.compile.backend import Backend
from ckpt_pass.offloading.stores import close_shared_stores, disk_store, host_store, store_for
from tests.zoo import StepResult, hf, loss_of, modular, run_step, seeded

CPU = torch.device("cpu")
#: A link of known rates: every machine makes the same plans.
LINK = {"d2h_bytes_per_s": 3e9, "h2d_bytes_per_s": 2e9}
DISK = Offload(to="disk", **LINK)
HOST = Offload(to="host", **LINK)
REFERENCES = {case.name: case.make for case in hf.CASES if case.name != "mixtral-batched-mm"}
LARGER = {"gpt2-12L": hf.gpt2_12l, "llama-16L": hf.llama_16l, "unet": modular.unet}
ALL = {**REFERENCES, **{name: seeded(make) for name, make in LARGER.items()}}
GPT2 = REFERENCES["gpt2"]


@pytest.fixture(autouse=True)
def apart() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    close_shared_stores()


def compiled_with(module: nn.Module, **options: Any) -> tuple[Callable[..., Any], Backend]:
    backend = ckpt_pass.make_backend(inner="aot_eager", **options)
    return torch.compile(module, backend=backend, fullgraph=True), backend


def least_of(module: nn.Module, inputs: tuple[Any, ...], **options: Any) -> int:
    """The least budget that a refusal names."""
    compiled, _ = compiled_with(module, budget=1, **options)
    with pytest.raises(BackendCompilerFailed) as caught:
        compiled(*inputs)
    torch._dynamo.reset()
    assert isinstance(caught.value.inner_exception, ckpt_pass.InfeasibleBudgetError)
    return caught.value.inner_exception.least_feasible_bytes


def assert_equal(ours: StepResult, plain: StepResult) -> None:
    assert torch.equal(ours.loss, plain.loss)
    assert ours.gradients.keys() == plain.gradients.keys()
    for name, gradient in plain.gradients.items():
        assert torch.equal(ours.gradients[name], gradient), name


def check_budget(
    make: Callable[[], tuple[nn.Module, tuple[Any, ...]]], part: float, offload: Offload
) -> None:
    """Gradients of aot_eager without us, measured peak as predicted and within the budget."""
    module, inputs = make()
    plain = run_step(module, inputs, torch.compile(module, backend="aot_eager", fullgraph=True))
    torch._dynamo.reset()
    module, inputs = make()
    least = least_of(module, inputs, offload=offload)
    top = ckpt_pass.plan(module, *inputs, budget=1.0).peak_bytes
    budget = least + int(part * (top - least))
    compiled, backend = compiled_with(module, budget=budget, offload=offload)
    assert_equal(run_step(module, inputs, compiled), plain)
    plan = backend.plans[-1]
    measured = ckpt_pass.measure_step(
        lambda: loss_of(compiled(*inputs)), repeats=1, params=module.parameters()
    )
    assert measured.peak_bytes == plan.peak_bytes <= budget
    assert store_for(offload, CPU).used_bytes == 0


@pytest.mark.parametrize("offload", [DISK, pytest.param(HOST, marks=pytest.mark.slow)], ids=str)
def test_a_budget_below_the_least_of_recomputation_alone(offload: Offload) -> None:
    module, inputs = GPT2()
    assert least_of(module, inputs, offload=offload) < least_of(module, inputs)
    check_budget(GPT2, 0.0, offload)


@pytest.mark.slow
def test_batch_norm_and_convolutions() -> None:
    check_budget(REFERENCES["resnet"], 0.2, DISK)


@pytest.mark.slow
@pytest.mark.parametrize("part", [0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("name", ALL)
def test_ten_budgets_of_every_model(name: str, part: float) -> None:
    check_budget(ALL[name], part, DISK)


def test_with_room_for_everything_nothing_moves() -> None:
    module, inputs = GPT2()
    plan = ckpt_pass.plan(module, *inputs, budget="1GiB", offload=DISK)
    assert plan.predicted.offloaded is not None and not plan.predicted.offloaded.values
    assert not plan.with_fate("offloaded")


def test_a_plan_tells_what_moves_and_a_file_carries_it_out_again(tmp_path: Path) -> None:
    module, inputs = GPT2()
    plain = run_step(module, inputs, torch.compile(module, backend="aot_eager", fullgraph=True))
    torch._dynamo.reset()
    module, inputs = GPT2()
    plan = ckpt_pass.plan(module, *inputs, budget=0.35, offload=DISK)
    found = plan.predicted.offloaded
    assert found is not None and found.moved_bytes == sum(v.nbytes for v in found.values) > 0
    assert all(
        t.out_start_s <= t.out_end_s <= t.released_s <= t.fetched_s <= t.in_start_s <= t.in_end_s
        for t in (value.transfer for value in found.values)
    )
    text = str(plan)
    assert "offloaded, most bytes first" in text and "behind compute" in text
    path = plan.save(tmp_path / "plan.json")
    assert ckpt_pass.load_plan(path) == plan
    compiled, backend = compiled_with(module, plan=path)
    assert_equal(run_step(module, inputs, compiled), plain)
    assert backend.plans[-1].peak_bytes == plan.peak_bytes
    assert backend.plans[-1].with_fate("offloaded") == plan.with_fate("offloaded")


@pytest.mark.slow
def test_a_plan_of_a_users_store_asks_for_it_again(tmp_path: Path) -> None:
    module, inputs = GPT2()
    store = disk_store()
    plan = ckpt_pass.plan(module, *inputs, budget=0.35, offload=store)
    path = plan.save(tmp_path / "plan.json")
    with pytest.raises(ckpt_pass.UnknownOptionError, match="offload=store"):
        ckpt_pass.make_backend(plan=path, inner="aot_eager")
    compiled, _ = compiled_with(module, plan=path, offload=store)
    loss_of(compiled(*inputs)).backward()
    assert store.allocated_bytes > 0 and store.used_bytes == 0


class Chain(nn.Module):
    """A chain of layers whose activations are all read by the backward."""

    def __init__(self, layers: int = 4, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


def chain() -> tuple[Chain, tuple[torch.Tensor]]:
    torch.manual_seed(0)
    return Chain(), (torch.randn(64, 64),)


def test_a_policy_moves_what_it_names() -> None:
    module, inputs = chain()
    plain = run_step(module, inputs)
    policy = ckpt_pass.offload(op="aten.tanh")
    compiled, backend = compiled_with(module, policy=policy, offload=DISK)
    assert_equal(run_step(module, inputs, compiled), plain)
    moved = backend.plans[-1].with_fate("offloaded")
    assert [d.decision for d in moved] == [CheckpointPolicy.MUST_CPU_OFFLOAD] * 4
    measured = ckpt_pass.measure_step(lambda: compiled(*inputs), params=module.parameters())
    assert measured.peak_bytes == backend.plans[-1].peak_bytes


@pytest.mark.parametrize("decision", ["MUST_CPU_OFFLOAD", "PREFER_CPU_OFFLOAD"])
def test_what_torchs_members_ask_for_is_moved(decision: str) -> None:
    module, inputs = chain()
    plain = run_step(module, inputs)

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
        tanh = op is torch.ops.aten.tanh.default
        return CheckpointPolicy[decision] if tanh else CheckpointPolicy.PREFER_RECOMPUTE

    compiled, backend = compiled_with(module, policy=policy, offload=DISK)
    assert_equal(run_step(module, inputs, compiled), plain)
    assert len(backend.plans[-1].with_fate("offloaded")) == 4


def test_a_policy_moves_what_it_names_under_a_budget_too() -> None:
    module, inputs = chain()
    policy = ckpt_pass.offload(op="aten.tanh")
    plan = ckpt_pass.plan(module, *inputs, policy=policy, budget="1GiB", offload=DISK)
    assert len(plan.with_fate("offloaded")) == 4


def test_the_graphs_say_when_values_go_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def split(*args: object, **kwargs: object) -> object:
        halves = partition.split(*args, **kwargs)  # type: ignore[arg-type]
        for half in halves:
            names = [str(node.target) for node in half.graph.nodes]
            ours = [name.split(".")[1] for name in names if name.startswith("ckpt_pass.")]
            seen.append(" ".join(ours))
        return halves

    monkeypatch.setattr(engine, "split", split)
    module, inputs = chain()
    compiled, _ = compiled_with(module, policy=ckpt_pass.offload(op="aten.tanh"), offload=DISK)
    compiled(*inputs).backward()
    assert seen == [
        "put put put put release release release release",
        "fetch fetch fetch take fetch take take take",
    ]


@pytest.mark.parametrize("times", [1, 2, 3])
def test_backward_again(times: int) -> None:
    module, inputs = chain()
    compiled, _ = compiled_with(module, policy=ckpt_pass.offload(op="aten.tanh"), offload=DISK)
    module(*inputs).backward()
    expected = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    loss = compiled(*inputs)
    for time in range(times):
        module.zero_grad()
        loss.backward(retain_graph=time < times - 1)
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        assert parameter.grad is not None and torch.equal(parameter.grad, gradient)
    del loss
    assert store_for(DISK, CPU).used_bytes == 0


def test_a_backward_that_never_comes_leaves_nothing() -> None:
    module, inputs = chain()
    compiled, _ = compiled_with(module, policy=ckpt_pass.offload(op="aten.tanh"), offload=DISK)
    loss = compiled(*inputs)
    assert store_for(DISK, CPU).used_bytes == 4 * 64 * 64 * 4
    del loss
    gc.collect()
    assert store_for(DISK, CPU).used_bytes == 0


def test_many_steps_take_no_more_of_the_store() -> None:
    module, inputs = chain()
    compiled, _ = compiled_with(module, policy=ckpt_pass.offload(op="aten.tanh"), offload=DISK)
    store = store_for(DISK, CPU)
    taken = []
    for _ in range(20):
        compiled(*inputs).backward()
        taken.append(store.allocated_bytes)
    assert len(set(taken[1:])) == 1


def test_a_full_store_is_an_error_and_the_step_can_be_tried_again() -> None:
    module, inputs = chain()
    store = host_store(budget_bytes=2 * 64 * 64 * 4)
    compiled, _ = compiled_with(module, policy=ckpt_pass.offload(op="aten.tanh"), offload=store)
    with pytest.raises(ckpt_pass.StoreFullError):
        compiled(*inputs)
    assert store.used_bytes == 0


def test_a_host_budget_is_a_number_or_words(tmp_path: Path) -> None:
    for given in (1 << 20, "1MiB"):
        module, inputs = chain()
        plain = run_step(module, inputs)
        store = Offload(host_budget=given, folder=tmp_path, to="disk", **LINK)
        policy = ckpt_pass.offload(op="aten.tanh")
        compiled, backend = compiled_with(module, policy=policy, offload=store)
        assert_equal(run_step(module, inputs, compiled), plain)
        assert backend.plans[-1].with_fate("offloaded")


def test_refusals() -> None:
    module, inputs = chain()
    with pytest.raises(ckpt_pass.InvalidOffloadError, match="budget or a policy"):
        ckpt_pass.make_backend(offload=True, inner="aot_eager")
    with pytest.raises(ckpt_pass.InvalidOffloadError, match="expected True, False"):
        ckpt_pass.plan(module, *inputs, budget=0.5, offload="disk")  # type: ignore[arg-type]


@pytest.mark.slow
def test_several_graphs_of_a_step_move_values_too() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = Chain(5), Chain(5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.one.layers:
                x = torch.tanh(layer(x))
            torch._dynamo.graph_break()
            return self.other(x)

    torch.manual_seed(0)
    module, inputs = Cut(), (torch.randn(512, 64),)
    plain = run_step(module, inputs)
    with pytest.raises(ckpt_pass.InfeasibleBudgetError) as caught:
        ckpt_pass.plan(module, *inputs, budget=1, offload=DISK)
    named = ckpt_pass.offload(op="aten.tanh")
    least = {"budget": caught.value.least_feasible_bytes, "offload": DISK}
    for asked in (least, {"budget": 1.0, "policy": named}):
        torch._dynamo.reset()
        plan = ckpt_pass.plan(module, *inputs, **asked)
        assert any(part.with_fate("offloaded") for part in plan.parts)
        check_step_plan(module, inputs, plan, plain)


def check_step_plan(
    module: nn.Module, inputs: tuple[Any, ...], plan: Any, plain: StepResult
) -> None:
    compiled = torch.compile(module, backend=ckpt_pass.make_backend(plan=plan, inner="aot_eager"))
    assert_equal(run_step(module, inputs, compiled), plain)
    measured = ckpt_pass.measure_step(lambda: compiled(*inputs), params=module.parameters())
    assert measured.peak_bytes == plan.peak_bytes <= plan.budget_bytes


def test_symbolic_sizes_stay_on_the_device() -> None:
    module, inputs = chain()
    plan = ckpt_pass.plan(module, *inputs, budget="1GiB", offload=DISK, dynamic=True)
    assert not plan.with_fate("offloaded")


@pytest.mark.slow
def test_the_same_model_and_link_give_the_same_plan() -> None:
    plans = []
    for _ in range(2):
        module, inputs = GPT2()
        plans.append(ckpt_pass.plan(module, *inputs, budget=0.35, offload=HOST).to_json())
    assert plans[0] == plans[1]
