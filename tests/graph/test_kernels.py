"""Measured kernels: right numbers, nothing disturbed, remembered on disk, exact predictions."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import default_partition, make_boxed_func
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch.profiler import profile, record_function
from torch.utils._python_dispatch import _disable_current_modes

import ckpt_pass
from ckpt_pass.graph.capture import capture
from ckpt_pass.graph.kernel_cache import (
    KernelCache,
    KernelCacheWarning,
    KernelFacts,
    default_folder,
)
from ckpt_pass.graph.kernel_call import KernelError
from ckpt_pass.graph.kernel_ops import is_runnable, may_have_workspace
from ckpt_pass.graph.kernels import WORKSPACE_AND_TIME, Kernels, measure_kernel
from ckpt_pass.measure.allocations import Allocation, Recording, profiled, read_recording
from tests.zoo import hf, loss_of

CPU = torch.device("cpu")
RUNS: list[tuple[int, ...]] = []  # sizes that the custom op below was really run on


@torch.library.custom_op("ckpt_pass_test::scratch", mutates_args=())
def scratch(x: Tensor, elements: int) -> Tensor:
    """Allocates a buffer of so many bytes while its output is there."""
    if elements < 0:
        raise KeyError("no such buffer")
    RUNS.append(tuple(x.shape))
    out = x.clone()
    buffer = x.new_empty(elements, dtype=torch.uint8)
    del buffer
    return out


@scratch.register_fake
def _(x: Tensor, elements: int) -> Tensor:
    return torch.empty_like(x)


class Scratch(nn.Module):
    def __init__(self, *elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        total = (self.weight * x).sum()
        for elements in self.elements:
            total = total + scratch((x * 2).detach(), elements).sum()
        return total


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()).square().mean()


@pytest.fixture
def kernels(tmp_path: Path) -> Kernels:
    return Kernels(KernelCache(tmp_path))


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def of_op(nodes: list[fx.Node], name: str) -> list[fx.Node]:
    return [node for node in nodes if name in str(node.target)]


# --- what is measured --------------------------------------------------------------------------


def test_a_known_workspace_is_found_to_the_byte(kernels: Kernels) -> None:
    with capture(Scratch(1_000, 70_000, 1_000, 0), torch.ones(8)) as joint:
        nodes = of_op(joint.nodes, "scratch")
        RUNS.clear()
        facts = kernels.facts(joint.nodes)
        assert [facts[node].workspace_bytes for node in nodes] == [1_000, 70_000, 1_000, 0]
        assert kernels.unmeasured == []
    assert RUNS == []  # an op of another library runs in a child process


@pytest.mark.gpu
def test_a_known_workspace_is_found_to_the_block_on_a_gpu(kernels: Kernels) -> None:
    with capture(Scratch(1_000, 70_000).cuda(), torch.ones(8, device="cuda")) as joint:
        facts = kernels.facts(joint.nodes, WORKSPACE_AND_TIME)
        found = [facts[node] for node in of_op(joint.nodes, "scratch")]
        assert [known.workspace_bytes for known in found] == [1_024, 70_144]
        assert all(known.time_s is not None and known.time_s > 0 for known in found)


def test_convolutions_have_workspaces_and_fp32_products_have_none(kernels: Kernels) -> None:
    model = nn.Sequential(Convolved())
    with capture(model, torch.randn(2, 3, 16, 16)) as joint:
        facts = kernels.facts(joint.nodes)
        convolutions = of_op(joint.nodes, "convolution")
        assert len(convolutions) == 4
        for node in convolutions:
            assert facts[node].workspace_bytes == alone(node)
        assert all(facts[node].workspace_bytes for node in convolutions)
    with capture(nn.Linear(32, 32), torch.randn(8, 32), loss_fn=mean_square) as joint:
        products = [*of_op(joint.nodes, "aten.mm"), *of_op(joint.nodes, "aten.addmm")]
        facts = kernels.facts(joint.nodes)
        assert products and all(facts[node].workspace_bytes == 0 for node in products)


def mean_square(output: Tensor) -> Tensor:
    return output.square().mean()


def alone(node: fx.Node) -> int:
    """The workspace of a call on tensors made here, with the profiler used here."""

    def real(source: fx.Node) -> Tensor:
        fake = source.meta["val"]
        return torch.ones(fake.shape, dtype=fake.dtype).as_strided(fake.shape, fake.stride())

    def kept(output: Any) -> int:
        tensors = output if isinstance(output, tuple) else (output,)
        return sum(t.untyped_storage().nbytes() for t in tensors if t is not None)

    with _disable_current_modes(), torch.no_grad():
        args = fx.map_arg(node.args, real)
        assert callable(node.target)
        node.target(*args)
        with profile(profile_memory=True) as session:
            out = node.target(*args)
    events = sorted(session.profiler.kineto_results.events(), key=lambda event: event.start_ns())  # type: ignore[union-attr]
    count, peak = 0, 0
    for event in events:
        if event.name() == "[memory]":
            count += event.nbytes()  # type: ignore[attr-defined]
            peak = max(peak, count)
    return peak - kept(out)


def test_only_ops_that_may_have_one_are_measured(kernels: Kernels) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(64))

        def forward(self, x: Tensor) -> Tensor:
            return ((x.to(torch.bfloat16) + self.weight) * 2.0).exp().sum()

    with capture(Mixed(), torch.ones(64)) as joint:
        (mixed,) = of_op(joint.forward, "aten.add.Tensor")
        (scaled,) = of_op(joint.forward, "aten.mul.Tensor")
        (alike,) = of_op(joint.forward, "aten.exp")
        assert may_have_workspace(mixed) and not may_have_workspace(alike)
        facts = kernels.facts(joint.nodes)
        assert facts[mixed].workspace_bytes == 64 * 4  # the bf16 operand, cast
        # A Python number becomes a double, and that one of the values' dtype.
        assert facts[scaled].workspace_bytes == 8 + 4
        assert alike not in facts
        timed = kernels.facts(joint.nodes, WORKSPACE_AND_TIME)
        assert set(timed) == {node for node in joint.nodes if is_runnable(node)}
        assert all(found.time_s is not None and found.time_s > 0 for found in timed.values())


def test_no_kernel_of_the_zoo_is_left_out_that_needs_memory(
    kernels: Kernels, one_thread: None
) -> None:
    """The table of classes misses nothing: what it leaves out allocates its outputs alone."""
    for build in (hf.resnet, hf.llama):
        module, inputs = build()
        with capture(module.to(torch.bfloat16), *as_bf16(inputs)) as joint:
            left_out = [n for n in joint.nodes if is_runnable(n) and not may_have_workspace(n)]
            # Time is asked for too, so that the table is not consulted.
            facts = kernels.facts(left_out, WORKSPACE_AND_TIME)
            assert facts
            worst = max(facts.items(), key=lambda item: item[1].workspace_bytes or 0)
            assert worst[1].workspace_bytes == 0, worst


def as_bf16(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.to(torch.bfloat16) if t.is_floating_point() else t for t in inputs)


def test_times_tell_large_from_small() -> None:
    with capture(nn.Linear(8, 8), torch.ones(8, 8), loss_fn=mean_square) as joint:
        small = measure_kernel(of_op(joint.nodes, "addmm")[0])
    with capture(nn.Linear(1024, 1024), torch.ones(1024, 1024), loss_fn=mean_square) as joint:
        large = measure_kernel(of_op(joint.nodes, "addmm")[0])
    # 2 Gflop take at least 10 ms / 100; a launch some microseconds.
    assert small.time_s is not None and large.time_s is not None
    assert 0 < 10 * small.time_s < large.time_s
    assert (small.workspace_bytes, large.workspace_bytes) == (0, 0)


def test_symbolic_sizes_are_measured_at_the_traced_shape(kernels: Kernels) -> None:
    model, x = Convolved(), torch.randn(2, 3, 16, 16)
    with capture(model, x) as joint:
        expected = kernels.facts(joint.nodes)
        static = [expected[n].workspace_bytes for n in of_op(joint.nodes, "convolution")]
    with capture(model, x, dynamic=True) as joint:
        found = kernels.facts(joint.nodes)
        assert [found[n].workspace_bytes for n in of_op(joint.nodes, "convolution")] == static


def test_saved_statistics_get_the_dtype_that_they_really_have(kernels: Kernels) -> None:
    """In a graph of autocast the fake statistics of a batch norm are bf16, the real ones fp32."""

    class Autocast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.norm(self.conv(x)).float().square().mean()

    with capture(Autocast(), torch.randn(2, 3, 16, 16)) as joint:
        (backward,) = of_op(joint.nodes, "batch_norm_backward")
        assert kernels.facts([backward])[backward].workspace_bytes is not None
        assert kernels.unmeasured == []


# --- what is left as it was --------------------------------------------------------------------


def random_state() -> list[int]:
    with _disable_current_modes():  # capture is still faking tensors
        state: list[int] = torch.get_rng_state().tolist()
    return state


def test_random_state_and_modes_stay(kernels: Kernels) -> None:
    dropout = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    with capture(dropout, torch.ones(4, 8), loss_fn=mean_square) as joint:
        before = random_state()
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            facts = kernels.facts(joint.nodes, WORKSPACE_AND_TIME)
            assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
        assert of_op(list(facts), "dropout")
        assert random_state() == before
        # Under autocast the product would run in bf16, and pack its factors.
        assert all(facts[node].workspace_bytes == 0 for node in of_op(joint.nodes, "addmm"))


def test_a_kernel_that_fails_is_named_and_the_others_are_measured(kernels: Kernels) -> None:
    with capture(Scratch(-1, 300), torch.ones(8)) as joint:
        failing, working = of_op(joint.nodes, "scratch")
        facts = kernels.facts(joint.nodes, WORKSPACE_AND_TIME)
        # Of what cannot be run its outputs say how much it may need.
        assert facts[failing] == KernelFacts(workspace_bytes=8 * 4)
        assert facts[working].workspace_bytes == 300
        (unmeasured,) = kernels.unmeasured
        assert unmeasured.name == failing.name
        assert str(unmeasured).endswith(
            "(ckpt_pass_test.scratch.default): KeyError: 'no such buffer'"
        )
        with pytest.raises(KernelError, match="cannot be measured on its own: KeyError"):
            measure_kernel(failing)


def test_under_a_profiler_nothing_is_measured_and_it_is_said(kernels: Kernels) -> None:
    with capture(Scratch(300), torch.ones(8)) as joint:
        with profile(), record_function("the user's own"):
            facts = kernels.facts(of_op(joint.nodes, "scratch"))
        assert [known.outputs for known in facts.values()] == [None]
        assert "a profiler is running" in kernels.unmeasured[0].reason


def test_inside_a_compilation(kernels: Kernels) -> None:
    """Called from AOTAutograd's partition function; the compiled step is right all the same."""
    seen: list[tuple[str, int | None]] = []

    def partition(gm: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
        for node, facts in kernels.facts(list(gm.graph.nodes), WORKSPACE_AND_TIME).items():
            seen.append((str(node.target), facts.workspace_bytes))
        return default_partition(gm, joint_inputs, **kwargs)

    backend = aot_autograd(
        fw_compiler=lambda gm, _: make_boxed_func(gm.forward), partition_fn=partition
    )
    torch.manual_seed(0)
    model, x = nn.Sequential(Convolved()), torch.randn(2, 3, 16, 16)
    state = torch.get_rng_state()
    loss = torch.compile(model, backend=backend, fullgraph=True)(x)
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state)
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model(x).backward()
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == 4
    assert all(torch.allclose(a, b) for a, b in zip(gradients, expected, strict=True))
    convolutions = [nbytes for name, nbytes in seen if "convolution" in name]
    assert len(convolutions) == 4 and all(convolutions)
    assert kernels.unmeasured == []


# --- the cache ---------------------------------------------------------------------------------


def test_what_is_known_is_not_run_again(tmp_path: Path) -> None:
    with capture(Scratch(500), torch.ones(8)) as joint:
        (node,) = of_op(joint.nodes, "scratch")
        first = Kernels(KernelCache(tmp_path)).facts([node])
        written = (tmp_path / "kernels.json").stat().st_mtime_ns
        assert Kernels(KernelCache(tmp_path)).facts([node]) == first
        assert (tmp_path / "kernels.json").stat().st_mtime_ns == written
        both = Kernels(KernelCache(tmp_path)).facts([node], WORKSPACE_AND_TIME)
        assert both[node].time_s is not None  # it was not known
        # Timed kernels must not change plans of modelled times.
        assert Kernels(KernelCache(tmp_path)).facts([node]) == first
    with capture(Scratch(501), torch.ones(8)) as joint:  # another number, another call
        other = Kernels(KernelCache(tmp_path)).facts(of_op(joint.nodes, "scratch"))
        assert [facts.workspace_bytes for facts in other.values()] == [501]


def test_another_thread_count_is_another_measurement(tmp_path: Path, one_thread: None) -> None:
    with capture(Scratch(500), torch.ones(8)) as joint:
        nodes = of_op(joint.nodes, "scratch")
        Kernels(KernelCache(tmp_path)).facts(nodes)
        torch.set_num_threads(2)
        Kernels(KernelCache(tmp_path)).facts(nodes)
        environments = json.loads((tmp_path / "kernels.json").read_text())["environments"]
        assert len(environments) == 2


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "\udcff".encode("utf-8", "surrogateescape").decode("latin-1"),
        '{"format": "somebody else\'s", "environments": {}}',
        '{"format": "ckpt_pass kernels 2", "environments": {"e": []}}',
        '{"format": "ckpt_pass kernels 2", "environments": {"e": {"c": {"workspace_bytes": "1"}}}}',
        '{"format": "ckpt_pass kernels 2", "environments": {"e": {"c": {"workspace_bytes": -1}}}}',
        '{"format": "ckpt_pass kernels 2", "environments": {"e": {"c": {"time_s": NaN}}}}',
        '{"format": "ckpt_pass kernels 2", "environments": {"e": {"c": {"code": "x"}}}}',
        "[" * 100_000,
    ],
)
def test_a_bad_file_is_warned_of_once_and_replaced(tmp_path: Path, content: str) -> None:
    (tmp_path / "kernels.json").write_text(content)
    with pytest.warns(KernelCacheWarning, match="holds no measured kernels") as caught:
        cache = KernelCache(tmp_path)
        assert cache.get("e", "c") is None
        cache.add("e", {"c": KernelFacts(7, 0.5)})
    assert len(caught) == 1
    assert quietly(lambda: KernelCache(tmp_path)).get("e", "c") == KernelFacts(7, 0.5)


def quietly(make: Callable[[], KernelCache]) -> KernelCache:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return make()


def test_two_writers_keep_what_the_other_wrote(tmp_path: Path) -> None:
    one, two = KernelCache(tmp_path), KernelCache(tmp_path)
    one.add("here", {"a": KernelFacts(workspace_bytes=1)})
    two.add("here", {"a": KernelFacts(time_s=0.25), "b": KernelFacts(2)})
    two.add("there", {"a": KernelFacts(3)})
    found = KernelCache(tmp_path)
    assert found.get("here", "a") == KernelFacts(1, 0.25)
    assert found.get("here", "b") == KernelFacts(2)
    assert found.get("there", "a") == KernelFacts(3)
    assert [path.name for path in tmp_path.iterdir()] == ["kernels.json"]
    json.loads((tmp_path / "kernels.json").read_text())


def test_a_file_is_read_again_once_another_process_has_replaced_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    KernelCache(tmp_path).add("here", {"a": KernelFacts(workspace_bytes=1)})
    text, read = (tmp_path / "kernels.json").read_text(), list[str]()
    real = json.loads
    monkeypatch.setattr(json, "loads", lambda text: read.append(text) or real(text))
    first = KernelCache(tmp_path)
    assert not read and first.get("here", "a") == KernelFacts(1)
    (tmp_path / "other").write_text(text.replace(":1}", ":20}"))
    (tmp_path / "other").replace(tmp_path / "kernels.json")
    assert KernelCache(tmp_path).get("here", "a") == KernelFacts(20)
    assert len(read) == 1 and first.get("here", "a") == KernelFacts(1)


def test_a_folder_that_cannot_be_written_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(KernelCacheWarning):
        cache = KernelCache(tmp_path / "file" / "below")
    with pytest.warns(KernelCacheWarning, match="cannot be written"):
        cache.add("e", {"c": KernelFacts(7)})
    assert cache.get("e", "c") == KernelFacts(7)


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CKPT_PASS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_folder() == tmp_path / "home" / ".cache" / "ckpt_pass"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "ckpt_pass"
    monkeypatch.setenv("CKPT_PASS_CACHE", str(tmp_path / "named"))
    assert default_folder() == tmp_path / "named"


# --- reading allocations -----------------------------------------------------------------------


def test_peaks_of_spans() -> None:
    events = [(1, 100), (3, 10), (4, 20), (5, -20), (6, -100), (8, 7), (9, 1000), (12, -5)]
    recording = Recording(
        tuple(Allocation(*event) for event in events),
        {"second": (7, 8), "first": (2, 6), "empty": (10, 11), "only frees": (12, 13)},
    )
    assert recording.peaks() == {"first": 30, "second": 7, "empty": 0, "only frees": 0}
    assert recording.balance_before(4) == 110


def test_a_recording_of_real_allocations() -> None:
    with profiled() as session:
        kept = torch.empty(1000, dtype=torch.uint8)
        with record_function("mine"):
            torch.empty(500, dtype=torch.uint8)
            torch.empty(300, dtype=torch.uint8)
    recording = read_recording(session, CPU, "mine".__eq__)
    assert recording.peaks() == {"mine": 500}
    assert recording.balance_before(recording.spans["mine"][0]) == kept.nbytes


# --- what it is for ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_predicted_peaks_are_those_measured(name: str, dtype: torch.dtype) -> None:
    """Without recomputation, at the least feasible budget, and half way between."""
    case = {case.name: case for case in hf.CASES}[name]

    def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
        module, inputs = case.make()
        return module.to(dtype), tuple(t.to(dtype) if t.is_floating_point() else t for t in inputs)

    module, inputs = make()
    plain = ckpt_pass.plan(module, *inputs, budget=1.0).peak_bytes
    with pytest.raises(ckpt_pass.InfeasibleBudgetError) as caught:
        ckpt_pass.plan(module, *inputs, budget=1)
    least = caught.value.least_feasible_bytes
    for budget in (plain, (plain + least) // 2, least):
        check_prediction(*make(), budget)


def test_the_predicted_peak_of_convolutions_is_the_one_measured() -> None:
    check_prediction(Convolved(), (torch.randn(2, 3, 16, 16),), 1.0)


def check_prediction(module: nn.Module, inputs: tuple[Tensor, ...], budget: int | float) -> None:
    """Compile with a budget; the plan's peak is within half a percent of the step's."""
    torch._dynamo.reset()
    backend = ckpt_pass.make_backend(budget=budget, inner="aot_eager")
    step = torch.compile(module, backend=backend, fullgraph=True)
    loss_of(step(*inputs)).backward()
    measured = ckpt_pass.measure_step(lambda: loss_of(step(*inputs)), repeats=1)
    plan = backend.plans[-1]
    assert plan.peak_bytes is not None and plan.budget_bytes is not None
    assert abs(plan.peak_bytes - measured.peak_bytes) <= 0.005 * measured.peak_bytes
    assert measured.peak_bytes <= plan.budget_bytes * 1.005
