"""Plan files: the same plan back, clear errors for anything else, and replayed as they were."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ckpt_pass
from ckpt_pass import Plan, PlanFileError
from ckpt_pass.plans.parts import Replay
from ckpt_pass.plans.record import CompiledExecution, EagerExecution
from ckpt_pass.plans.writing import checksum
from tests.zoo import hf

#: A compiled plan and an eager one of three small blocks, as the first version wrote them.
OLD = sorted((Path(__file__).parent / "format_1").glob("*.json"))
SMALL = {"gpt2": hf.gpt2, "resnet": hf.resnet, "mixtral": hf.mixtral}
KINDS: dict[str, dict[str, Any]] = {
    "policy": {"policy": "save-matmul"},
    "budget": {"budget": 0.9},
    "eager": {"budget": 0.97, "mode": "eager"},
    "dynamic": {"budget": 0.9, "dynamic": True},
}


def plan_of(name: str, **how: Any) -> Plan:
    model, args = SMALL[name]()
    return ckpt_pass.plan(model, *args, **how)


ROUND_TRIPS = [(name, kind) for name in ("gpt2", "resnet") for kind in KINDS if kind != "dynamic"]


@pytest.mark.parametrize(
    ("name", "kind"), [*ROUND_TRIPS, pytest.param("gpt2", "dynamic", marks=pytest.mark.slow)]
)
def test_round_trip(name: str, kind: str, tmp_path: Path) -> None:
    plan = plan_of(name, **KINDS[kind])
    again = Plan.load(plan.save(tmp_path / "plan.json"))
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert str(again) == str(plan)


@pytest.mark.slow
def test_the_file_of_a_large_plan_is_small() -> None:
    model, args = hf.llama_16l()
    for how in ({"budget": 90_000_000}, {"budget": 90_000_000, "mode": "eager"}):
        plan = ckpt_pass.plan(model, *args, **how)
        text = plan.to_json()
        assert len(text) < 200_000
        assert Plan.from_json(text) == plan


def test_files_of_the_first_format_are_read() -> None:
    compiled, eager = (Plan.load(path) for path in OLD)
    assert (compiled.mode, compiled.peak_bytes, compiled.budget_bytes) == ("compiled", 23912, 27960)
    assert (eager.mode, eager.peak_bytes, eager.budget_bytes) == ("eager", 31944, 36896)
    assert compiled.regions == ("0", "1", "2") and eager.regions == ("0", "1")
    assert isinstance(compiled.execution, CompiledExecution)
    assert compiled.symbols == {"argument 0 dim 0": str(compiled.dimensions[0].symbol)}
    assert isinstance(eager.execution, EagerExecution) and not eager.execution.random_regions
    for plan in (compiled, eager):
        assert Plan.from_json(plan.to_json()) == plan
        assert plan.proven.status in str(plan) or plan.gap > 0


def test_fields_that_moved_are_found_by_their_old_names() -> None:
    compiled, eager = (Plan.load(path) for path in OLD)
    assert compiled.timeline is compiled.predicted.timeline
    assert compiled.lower_bound_s == compiled.proven.lower_bound_s
    assert (compiled.random_regions, eager.graph_break) == (None, None)
    with pytest.raises(AttributeError, match="Did you mean 'peak_bytes'"):
        _ = compiled.peak_byte  # type: ignore[attr-defined]


def test_a_policy_that_is_code_leaves_its_words() -> None:
    def mine(site: ckpt_pass.SiteContext) -> None:
        return None

    plan = plan_of("gpt2", policy=mine)
    again = Plan.from_json(plan.to_json())
    assert "mine" in repr(again.asked.policy)
    assert dataclasses.replace(again, asked=plan.asked) == plan


# --- replay ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["policy", "budget"])
def test_a_loaded_plan_is_carried_out(kind: str, tmp_path: Path) -> None:
    model, args = hf.gpt2()
    plan = ckpt_pass.plan(model, *args, **({"budget": 0.6} if kind == "budget" else KINDS[kind]))
    backend = ckpt_pass.make_backend(plan=plan.save(tmp_path / "plan.json"), inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    measured = ckpt_pass.measure_step(lambda: compiled(*args), repeats=1)
    (made,) = backend.plans
    assert made.saved_sites == plan.saved_sites
    assert made.peak_bytes == plan.peak_bytes
    assert abs(measured.peak_bytes - plan.peak_bytes) <= 64
    stock = torch.compile(model, backend="aot_eager")
    ckpt_pass.compare_gradients(
        lambda: stock(*args), lambda: compiled(*args), model
    ).raise_if_different()


class Tied(nn.Module):
    """A weight under two names, read first as a table and last as a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(64, 32), nn.Linear(32, 64, bias=False)
        self.head.weight = self.embedding.weight
        self.norm = nn.BatchNorm1d(32)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.embedding(ids)).sin().exp())
        return logits.square().mean()


def test_tied_weights_are_one_ahead_of_time_too() -> None:
    model, ids = Tied(), torch.arange(256) % 64
    with pytest.raises(ckpt_pass.InfeasibleBudgetError) as caught:
        ckpt_pass.plan(model, ids, budget=1)
    least = caught.value.least_feasible_bytes
    plan = ckpt_pass.plan(model, ids, budget=least)
    for how in ({"budget": least}, {"plan": plan}):
        torch.compiler.reset()
        backend = ckpt_pass.make_backend(inner="aot_eager", **how)  # type: ignore[arg-type]
        compiled = torch.compile(model, backend=backend)
        found = ckpt_pass.compare_gradients(lambda: model(ids), lambda c=compiled: c(ids), model)
        found.raise_if_different()
        measured = ckpt_pass.measure_step(lambda c=compiled: c(ids), repeats=1)
        assert ckpt_pass.plan_differences(plan, backend.plans[0]) == ()
        assert measured.peak_bytes == plan.peak_bytes <= least


@pytest.mark.parametrize("mode", ["compiled", "eager"])
def test_planning_leaves_a_module_with_two_names_as_it_is(mode: Any) -> None:
    """``torch.func.functional_call`` would put a plain tensor in the place of its weight."""
    layer = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    model, x = nn.Sequential(layer, nn.ReLU(), layer), torch.ones(4, 8)
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    ckpt_pass.plan(model, x, budget=1.0, mode=mode, loss_fn=torch.sum)
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert len(before) == 7
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)


def test_a_plan_that_is_over_its_budget_here_says_so() -> None:
    model, args = hf.gpt2()
    plan = ckpt_pass.plan(model, *args, budget=0.6)
    asked = dataclasses.replace(plan.asked, budget_bytes=plan.peak_bytes - 1)
    less = dataclasses.replace(plan, asked=asked)
    backend = ckpt_pass.make_backend(plan=less, inner="aot_eager")
    with pytest.warns(ckpt_pass.BudgetExceededWarning, match="above its budget of"):
        torch.compile(model, backend=backend)(*args)


def _replaying(plan: Plan, script: Replay) -> Plan:
    """A plan with another script."""
    assert isinstance(plan.execution, CompiledExecution)
    return dataclasses.replace(plan, execution=dataclasses.replace(plan.execution, replay=script))


@pytest.mark.parametrize("what", ["saved", "drops", "merged"])
def test_a_value_that_is_not_there_is_named(what: str) -> None:
    model, args = hf.gpt2()
    plan = ckpt_pass.plan(model, *args, budget=0.6)
    odd: Any = ("backward of:nothing",) if what == "saved" else (("backward of:nothing",) * 2,)
    assert plan.replay is not None
    script = dataclasses.replace(plan.replay, **{what: getattr(plan.replay, what) + odd})
    backend = ckpt_pass.make_backend(plan=_replaying(plan, script), inner="aot_eager")
    with pytest.raises(Exception, match=r"lacks 1 values of the plan \(first: backward of:nothing"):
        torch.compile(model, backend=backend)(*args)


def test_a_value_that_is_merged_away_cannot_be_saved() -> None:
    model, args = hf.gpt2()
    plan = ckpt_pass.plan(model, *args, budget=0.6)
    assert plan.replay is not None
    gone, _ = plan.replay.merged[0]
    script = dataclasses.replace(plan.replay, saved=(*plan.replay.saved, gone))
    odd = _replaying(plan, script)
    backend = ckpt_pass.make_backend(plan=odd, inner="aot_eager")
    with pytest.raises(Exception, match="lacks 1 values of the plan"):
        torch.compile(model, backend=backend)(*args)


def test_open_sizes_and_a_plan_of_other_ones() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    plan = ckpt_pass.plan(model, torch.randn(4, 8), budget=1.0, loss_fn=torch.sum)
    backend = ckpt_pass.make_backend(plan=plan)
    compiled = torch.compile(lambda x: model(x).sum(), backend=backend, dynamic=True)
    with pytest.raises(Exception, match="dynamic=False"):
        compiled(torch.randn(6, 8))


def test_inductor_takes_ops_apart_first() -> None:
    model, args = hf.gpt2()
    backend = ckpt_pass.make_backend(
        plan=ckpt_pass.plan(model, *args, budget=0.6), inner="inductor"
    )
    with pytest.raises(Exception, match="inductor takes ops apart"):
        torch.compile(model, backend=backend)(*args)


def test_nothing_is_solved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, args = hf.mixtral()
    plan = ckpt_pass.plan(model, *args, budget=0.8)

    def solve(*_: Any, **__: Any) -> Any:
        raise AssertionError("a replay asks no solver")

    monkeypatch.setattr("ckpt_pass.compile.budgeting.run_solver", solve)
    backend = ckpt_pass.make_backend(plan=plan, inner="aot_eager")
    torch.compile(model, backend=backend)(*args)
    assert backend.plans[0].peak_bytes == plan.peak_bytes
    assert backend.plans[0].replay == plan.replay


def test_an_eager_plan_under_the_backend(tmp_path: Path) -> None:
    model, args = hf.gpt2()
    plan = ckpt_pass.plan(model, *args, budget=0.6, mode="eager")
    for one in (plan, plan.save(tmp_path / "plan.json")):
        with pytest.raises(ckpt_pass.PlanMismatchError, match=r"plan\.apply\(model\)"):
            ckpt_pass.make_backend(plan=one, inner="aot_eager")


def test_a_compiled_plan_in_eager() -> None:
    model, args = hf.gpt2()
    plan = ckpt_pass.plan(model, *args, policy="save-matmul")
    assert plan.regions

    def planned() -> torch.Tensor:
        with plan.applied(model):
            loss: torch.Tensor = model(*args)
        return loss

    ckpt_pass.compare_gradients(lambda: model(*args), planned, model).raise_if_different()


def test_a_plan_for_another_shape_says_so() -> None:
    model, args = hf.gpt2()
    plan = ckpt_pass.plan(model, *args, budget=0.6)
    other = tuple(argument[:1] for argument in args)
    backend = ckpt_pass.make_backend(plan=plan, inner="aot_eager")
    with pytest.raises(Exception, match=r"arguments int64\[1, 32\] here, int64\[4, 32\]"):
        torch.compile(model, backend=backend)(*other)


@pytest.mark.slow
def test_differences_between_plans() -> None:
    one = plan_of("gpt2", budget=0.6)
    assert ckpt_pass.plan_differences(one, one) == ()
    first, *_ = ckpt_pass.plan_differences(one, plan_of("gpt2", budget=0.7))
    assert "budget_bytes" in first
    decisions = ckpt_pass.plan_differences(one, plan_of("gpt2", budget=0.9))
    assert any("in one" in line and "aten." in line for line in decisions)


def test_the_fingerprint_is_the_same_in_every_process() -> None:
    program = (
        "import ckpt_pass; from tests.zoo import hf; m, a = hf.gpt2();"
        "print(ckpt_pass.plan(m, *a, budget=0.6).fingerprint,"
        "ckpt_pass.plan(m, *a, budget=0.6, mode='eager').fingerprint)"
    )
    here = [plan_of("gpt2", budget=0.6, mode=mode).fingerprint for mode in ("compiled", "eager")]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(root)}
    found = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, check=True, cwd=root, env=environment,
    )  # fmt: skip
    assert found.stdout.split() == here


def test_the_fingerprint_covers_what_was_asked_for() -> None:
    plans = [
        plan_of("gpt2", budget=0.6),
        plan_of("gpt2", budget=0.7),
        plan_of("gpt2", budget=0.6, solver="layers"),
        plan_of("gpt2", policy="save-matmul"),
    ]
    assert len({plan.fingerprint for plan in plans}) == len(plans)


# --- damaged and hostile files --------------------------------------------------------------


@pytest.fixture(scope="module")
def written() -> dict[str, Any]:
    """The data of two plans' files, and of two that an older version wrote."""
    layers = (nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(3))
    open_sizes = ckpt_pass.plan(
        nn.Sequential(*layers), torch.randn(256, 16), budget=0.8, dynamic=True
    )
    plans = {"budget": open_sizes, "eager": plan_of("gpt2", **KINDS["eager"])}
    found = {kind: json.loads(plan.to_json()) for kind, plan in plans.items()}
    return found | {f"format 1, {path.stem}": json.loads(path.read_text()) for path in OLD}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected JSON"),
        ("[]", "an object"),
        ("{}", "'format'"),
        ('{"format": 99}', "format"),
        ('{"format": 1}', "checksum"),
        ('{"format": 1, "checksum": NaN}', "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        ('{"format": 1' + ', "a": 9' * 3 + "e99999}", "expected"),
    ],
)
def test_what_is_no_plan(text: str, message: str) -> None:
    with pytest.raises(PlanFileError, match=message):
        Plan.from_json(text)


def test_no_text_at_all(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanFileError, match="UTF-8"):
        Plan.load(path)


def test_a_changed_file_is_refused(written: dict[str, Any]) -> None:
    data = copy.deepcopy(written["budget"])
    data["predicted"]["peak_bytes"] += 1
    with pytest.raises(PlanFileError, match="checksum"):
        Plan.from_json(json.dumps(data))


def test_expressions_are_not_evaluated(written: dict[str, Any]) -> None:
    for hostile in (
        "__import__('os').system('true')",
        ["pow", 10, 10**9],
        ["pow", 10, 17],
        ["lambda", 1],
        ["symbol", "s0", "commutative"],
        ["rational", 1, 0],
        10**30,
        ["max", ["symbol", "s0"], ["mul", ["pow", ["symbol", "s0"], -1], "x"]],
    ):
        data = copy.deepcopy(written["budget"])
        data["execution"]["peak_expression"] = hostile
        data["checksum"] = checksum(data)
        with pytest.raises(PlanFileError, match="peak_expression"):
            Plan.from_json(json.dumps(data))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a file; of long lists the first few members."""
    found = [path] if path else []
    if isinstance(value, dict):
        for key, item in value.items():
            found += places(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value[:4]):
            found += places(item, (*path, index))
    return found


def mutate(data: Any, path: tuple[Any, ...], how: str, value: Any) -> None:
    *before, last = path
    for key in before:
        data = data[key]
    if how == "drop":
        del data[last]
    elif how == "double" and isinstance(data, list):
        data.insert(last, copy.deepcopy(data[last]))
    else:
        data[last] = value


def check_mutation(written: dict[str, Any], draw: st.DataObject) -> None:
    """A file with one thing changed is refused, or, signed again, is a plan of the same format."""
    kind = draw.draw(st.sampled_from(sorted(written)))
    data = copy.deepcopy(written[kind])
    path = draw.draw(st.sampled_from(places(data)))
    how = draw.draw(st.sampled_from(["drop", "double", "set"]))
    mutate(data, path, how, draw.draw(VALUES))
    plain = json.dumps(data)
    if plain == json.dumps(written[kind]):  # not ==: False is 0 there, and no number of a file
        assert Plan.from_json(plain).to_json()
        return
    with pytest.raises(PlanFileError):
        Plan.from_json(plain)
    if "checksum" in data:
        data["checksum"] = checksum(data)
    try:
        plan = Plan.from_json(json.dumps(data))
    except PlanFileError:
        return
    assert Plan.from_json(plan.to_json()) == plan  # a plan like any other


QUICK = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=QUICK)
@given(draw=st.data())
def test_mutated_files(written: dict[str, Any], draw: st.DataObject) -> None:
    check_mutation(written, draw)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, derandomize=True, suppress_health_check=QUICK)
@given(draw=st.data())
def test_two_thousand_mutated_files(written: dict[str, Any], draw: st.DataObject) -> None:
    check_mutation(written, draw)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=QUICK)
@given(draw=st.data())
def test_damaged_bytes(written: dict[str, Any], draw: st.DataObject, tmp_path: Path) -> None:
    text = bytearray(json.dumps(written["eager"]).encode())
    for _ in range(draw.draw(st.integers(1, 4))):
        text[draw.draw(st.integers(0, len(text) - 1))] = draw.draw(st.integers(0, 255))
    path = tmp_path / "plan.json"
    path.write_bytes(bytes(text[: draw.draw(st.integers(1, len(text)))]))
    try:
        plan = Plan.load(path)
    except PlanFileError:
        return
    assert json.loads(plan.to_json())["checksum"] == written["eager"]["checksum"]
