"""The benchmarks run and give well-formed rows; their exact byte counts hold. No timing here."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks import (
    budget_times,
    budgets,
    deep,
    eager_cost,
    gpu,
    gpu_headline,
    gpu_offload,
    inductor,
    inductor_times,
    offload_planning,
    offload_ways,
    on_gpu,
    optimum,
    partition_cost,
    peaks,
    planning,
    published,
    run,
    sac_milp,
    strategies,
    tuning,
)
from benchmarks.common import (
    Bar,
    BudgetRow,
    ClaimRow,
    Cost,
    DeepRow,
    GpuRow,
    InductorRow,
    OptimumRow,
    PeakRow,
    PlanningRow,
    PublishedRow,
    Ran,
    Result,
    SacRow,
    StrategyOf,
    TimingRow,
    TuningRow,
    Variant,
    WayRow,
    interleave,
)
from ckpt_pass.ops.flops import FlopCounter
from tests.zoo import Built, children_of, seeded, stack


def _block() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.5), nn.Linear(64, 64))


@seeded
def small() -> Built:
    """Three blocks of two matmuls; dropout, so that random states have to be paired."""
    return stack(_block, _block, _block)(), (torch.randn(32, 64),)


def assert_timed(result: Result, variants: list[str], rounds: int) -> None:
    rows = [row for row in result.rows if isinstance(row, TimingRow)]
    assert [row.variant for row in rows] == variants
    for row in rows:
        assert row.rounds == rounds
        assert 0 < row.least_s <= row.median_s <= row.upper_quartile_s
        assert row.ratios and all(ratio > 0 for ratio in row.ratios.values())


@pytest.mark.slow
def test_eager_cost_times_every_variant() -> None:
    result = eager_cost.run(rounds=3, warmup=0, blocks=2)
    assert_timed(result, list(eager_cost.ways()), rounds=3)
    assert {bar.limit for bar in result.bars} == {1.0, 0.85, 0.6}


@pytest.mark.slow
def test_budgets_with_inductor_on_a_small_model() -> None:
    result = inductor.run({"small": small}, parts=(0.0, 0.5), stock_budgets=(1.0, 0.0))
    stock, least, middle = (row for row in result.rows if isinstance(row, InductorRow))
    assert stock.part is None and stock.rounds == 2
    for row in (least, middle):
        assert row.measured_bytes == row.predicted_bytes <= row.budget_bytes
        assert row.rounds >= 1 and row.compile_s > 0
    assert least.measured_bytes <= middle.budget_bytes
    names = {bar.what: bar for bar in result.bars}
    assert names["measured peak over the budget, worst"].met


@pytest.mark.slow
def test_the_way_of_a_gpu_is_gone_without_one() -> None:
    result = gpu.run(device="cpu", stock=(1.0,), parts=(0.0,), rounds=1)
    rows = [row for row in result.rows if isinstance(row, GpuRow)]
    assert [row.budget_bytes is None for row in rows] == [True, True, *[False] * (len(rows) - 2)]
    for row in rows[2:]:
        assert row.measured_bytes == row.predicted_bytes <= (row.budget_bytes or 0)
    assert all(row.gradient_off < 1e-4 and row.step_s > 0 for row in rows)


@pytest.mark.slow
def test_offloading_from_a_gpu_is_gone_without_one() -> None:
    result = gpu_offload.run(device="cpu", rounds=1)
    rows = {row.way: row for row in result.rows if isinstance(row, GpuRow)}
    assert list(rows) == [
        gpu_offload.STOCK,
        gpu_offload.BLOCKS,
        gpu_offload.MOVED,
        gpu_offload.KEPT,
        "save_on_cpu",
    ]
    for name in (gpu_offload.MOVED, gpu_offload.KEPT):
        row = rows[name]
        assert row.measured_bytes == row.predicted_bytes <= (row.budget_bytes or 0)
    assert all(row.gradient_off < 1e-4 for row in rows.values())


@pytest.mark.slow
def test_all_for_a_gpu_goes_without_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command on a tiny model: no way is left out, and the results are written."""
    assert on_gpu.main(["--dry-run", "--no-tests", f"--out={tmp_path}"]) == 0
    assert f"saved as {tmp_path}" in capsys.readouterr().out
    (path,) = tmp_path.glob("gpu-headline-cpu-*.json")
    written = json.loads(path.read_text())
    assert written["facts"]["left_out"] == [] and len(written["rows"]) == 4
    ours = [row for row in written["rows"] if row["budget_bytes"] is not None]
    assert len(ours) == 2
    for row in ours:
        assert row["measured_bytes"] == row["predicted_bytes"] <= row["budget_bytes"]
    assert all(row["gradient_off"] < 1e-4 for row in written["rows"])
    assert "1/2 of the activations" in path.with_suffix(".txt").read_text()


@pytest.mark.slow
def test_the_tests_for_a_gpu_are_found() -> None:
    assert re.fullmatch(r"\d+/\d+ tests collected .*", on_gpu.run_tests(dry_run=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert on_gpu.main([]) == 2
    assert "make gpu needs a GPU" in capsys.readouterr().err


def test_what_fails_or_has_no_time_is_left_out() -> None:
    clock = gpu_headline.Clock(limit_s=0.05)

    def failing() -> None:
        raise RuntimeError("no kernel\nand more")

    clock.run("one", failing)
    clock.run("two", lambda: time.sleep(0.06))
    clock.run("three", lambda: None)
    assert clock.left_out == ["one: RuntimeError: no kernel", "three: no time"]


def test_eager_variants_save_what_their_names_say() -> None:
    flops = {}
    for name, step in eager_cost.steps(blocks=2).items():
        with FlopCounter() as counter:
            step()
        flops[name] = counter.flops
    plain = flops[eager_cost.PLAIN]
    up = 2 * eager_cost.TOKENS * eager_cost.WIDTH * (2 * eager_cost.WIDTH)  # one matmul
    for name in (eager_cost.TORCH_LIST, eager_cost.TORCH_FN, eager_cost.OURS, eager_cost.OURS_FN):
        assert flops[name] == plain
    assert flops[eager_cost.OURS_DEFAULT] == plain
    # Stopping early, the recomputation needs no output of "down": of two matmuls it makes one.
    assert flops[eager_cost.OURS_MODULES] == plain
    assert flops[eager_cost.NON_REENTRANT] == plain + 2 * up
    assert flops[eager_cost.REENTRANT] == plain + 2 * 2 * up


def test_a_variant_with_other_gradients_is_refused() -> None:
    found = eager_cost.steps(blocks=2)
    next(found[eager_cost.OURS].model.parameters()).data.mul_(2.0)
    with pytest.raises(eager_cost.GradientsDifferError, match="bitwise"):
        eager_cost.check_gradients(found)


def test_partition_cost_times_every_partitioner() -> None:
    result = partition_cost.run(rounds=2, warmup=0, make=small, name="small")
    assert_timed(result, list(partition_cost.partitioners()), rounds=2)
    assert result.facts["nodes"] == len(partition_cost.capture(small).module.graph.nodes)


def test_each_round_runs_every_variant_once_in_another_order() -> None:
    calls: list[str] = []
    variants = [Variant(name, calls.append, partial(str, name)) for name in "abc"]
    interleave(variants, rounds=3, warmup=0)
    assert "".join(calls) == "abcbcacab"


@pytest.mark.slow
def test_peaks_of_a_small_model() -> None:
    result = peaks.run([peaks.Reference("small", small, children_of("layers"), 10**9)])
    rows = {row.variant: row for row in result.rows if isinstance(row, PeakRow)}
    assert list(rows) == list(peaks.variants())
    for row in rows.values():
        assert 0 < row.saved_bytes <= row.peak_bytes
    plain = rows[peaks.PLAIN].flops
    assert rows[peaks.OURS_NOTHING].flops > plain
    assert rows[peaks.OURS_SELECTIVE].flops == rows[peaks.TORCH_SAC].flops == plain
    assert [bar.unit for bar in result.bars] == ["bytes"] * 3


def test_strategies_and_claims_of_a_small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "MODELS", {"small": small})
    table, claims = strategies.run(rounds=1, models=("small",))
    rows = {row.row.name: row.row for row in table.rows if isinstance(row, StrategyOf)}
    assert set(strategies.STRATEGIES) < set(rows) and len(rows) == len(strategies.STRATEGIES) + 3
    assert all(row.equal for row in rows.values() if not row.failure)
    assert rows["heavy-ops"].failure.startswith("heavy-ops chose nothing")
    assert table.bars[0].met
    checked = [row for row in claims.rows if isinstance(row, ClaimRow)]
    assert "alternate" in {row.strategy for row in checked}
    for row in checked:
        assert row.saving == rows[row.strategy].saving
    for result in (table, claims):
        with (console := Console(width=run.PIPED_WIDTH)).capture() as shown:
            run.show(result, console)
        assert "alternate" in shown.get()


def test_results_are_shown_and_saved(tmp_path: Path) -> None:
    row = PeakRow("model", "ours", peak_bytes=3, saved_bytes=2, flops=1)
    bars = (Bar("met", 3, 4, "bytes"), Bar("not met", 1.5, 1.0))
    result = Result("peaks", "Peaks", (row,), bars)
    with (console := Console(width=run.PIPED_WIDTH)).capture() as shown:
        run.show(result, console)
    assert "missed  not met: 1.500 <= 1.00" in shown.get()
    (path,) = run.save(result, tmp_path / "results")
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["rows"] == [
        {"model": "model", "variant": "ours", "peak_bytes": 3, "saved_bytes": 2, "flops": 1}
    ]
    assert [bar["met"] for bar in data["bars"]] == [True, False]
    assert data["measured_on"]["torch"]


@pytest.mark.slow
@pytest.mark.parametrize("reference", peaks.REFERENCES, ids=lambda reference: reference.name)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (peaks.OURS_NOTHING, peaks.TORCH_CHECKPOINT),
        (peaks.OURS_SELECTIVE, peaks.TORCH_SAC),
    ],
)
def test_peak_is_at_most_torchs(reference: peaks.Reference, ours: str, theirs: str) -> None:
    got = peaks.measure(reference, ours).peak_bytes
    assert got <= peaks.measure(reference, theirs).peak_bytes
    if ours == peaks.OURS_NOTHING:
        assert reference.known_bytes is not None and got <= reference.known_bytes


def budget_rows(result: Result) -> list[BudgetRow]:
    return [row for row in result.rows if isinstance(row, BudgetRow)]


def shown(result: Result) -> str:
    with (console := Console(width=run.PIPED_WIDTH)).capture() as captured:
        run.show(result, console)
    return captured.get()


@pytest.mark.slow
def test_budgets_beside_torch_on_a_small_model() -> None:
    result = budgets.run({"small": small}, budgets=(1.0, 0.0))
    saving, recomputing = budget_rows(result)
    for row in (saving, recomputing):
        assert row.torch is not None and row.ours is not None and row.over_bytes <= 0
    assert saving.torch is not None and recomputing.torch is not None
    # A GELU's backward wants its input, so that at budget 1 no matmul runs again.
    assert saving.torch.recompute_flops == 0 < recomputing.torch.recompute_flops
    assert saving.torch.recompute_time_s < recomputing.torch.recompute_time_s
    assert saving.on_front
    # At budget 0 torch draws dropout anew.
    assert saving.torch_right and not recomputing.torch_right
    text = shown(result)
    assert "measured peak over the budget" in text
    assert "worst but for 1 wrong steps of torch's" in text and "0!" in text


def budget_row(ours: Cost | None, theirs: Cost) -> BudgetRow:
    return BudgetRow("model", "float32", 0.5, theirs, ours, step_flops=10, step_time_s=1.0)


def test_step_times_are_compared_at_points_of_torchs_front() -> None:
    ample = Cost(10**9, 0, 0.0)
    points = [
        BudgetRow("small", "float32", 1.0, ample, ample, on_front=True),
        budget_row(None, ample),
    ]
    result = budget_times.run(points, rounds=2, models={"small": small})
    names = [f"small 1000.0 MB: {way}" for way in (budget_times.TORCH, budget_times.OURS)]
    assert_timed(result, names, rounds=2)
    (bar,) = result.bars
    assert bar.value > 0 and "quartiles" in bar.what


def test_ratios_of_budgets() -> None:
    nothing, little, much = Cost(2, 0, 0.0), Cost(2, 1, 0.1), Cost(2, 4, 0.2)
    assert (budget_row(little, much).time_ratio, budget_row(little, much).flops_ratio) == (
        0.5,
        0.25,
    )
    assert budget_row(nothing, nothing).time_ratio == 0.0
    assert budget_row(little, nothing).time_ratio == float("inf")
    missing = budget_row(None, much)
    assert missing.over_bytes == missing.flops_ratio == float("inf")


def test_torchs_front_is_what_no_other_setting_beats() -> None:
    cheap, low, beaten = Cost(9, 0, 0.1), Cost(5, 0, 0.2), Cost(5, 0, 0.3)
    points = [cheap, low, beaten]
    assert [budgets.on_front(point, points) for point in points] == [True, True, False]


def test_a_point_where_torch_raises_is_shown_and_left_out_of_the_bars() -> None:
    result = budgets.run({"small": small}, budgets=(2.0,))  # torch knows 0 to 1
    (row,) = budget_rows(result)
    assert row.torch is None and row.failure
    assert not result.bars and "torch fails" in shown(result)


def test_planning_times_a_chain_and_draws_it(tmp_path: Path) -> None:
    result = planning.run(layers=(2,), rounds=1, reference=False)
    (row,) = result.rows
    assert isinstance(row, PlanningRow) and row.layers == 2
    assert min(row.capture_s, row.problem_s, row.solve_s) > 0
    assert f"{row.nodes:,}" in shown(result)
    json_path, png = run.save(result, tmp_path)
    assert json.loads(json_path.read_text(encoding="utf-8"))["rows"][0]["nodes"] == row.nodes
    assert png.read_bytes().startswith(b"\x89PNG")


def test_planning_has_bars_for_what_it_was_asked_to_time() -> None:
    deepest = PlanningRow("narrow Llama", planning.DEEPEST, 1, 1.0, 1.0, 19.5, rounds=1)
    reference = PlanningRow(planning.REFERENCE, 16, 1, 1.0, 0.5, 1.0, rounds=1)
    assert [bar.met for bar in planning.bars([reference, deepest])] == [True, False]


def test_planning_with_links_is_timed_beside_planning_without() -> None:
    result = offload_planning.run(layers=(2,), rounds=1, reference=False, parts=(0.6,))
    rows = [row for row in result.rows if isinstance(row, PlanningRow)]
    assert [row.model.rpartition(", ")[2] for row in rows] == [
        offload_planning.ALONE, "link of 0.3", "link of 1",
    ]  # fmt: skip
    assert all(row.solve_s > 0 for row in rows) and "link of 0.3" in shown(result)
    seconds = {offload_planning.ALONE: 1.0, "link of 1": 2.5}
    deepest = [
        PlanningRow(f"chain, 0.5, {way}", planning.DEEPEST, 1, 1.0, 1.0, solve_s, rounds=1)
        for way, solve_s in seconds.items()
    ]
    reference = [replace(row, layers=planning.REFERENCE_LAYERS) for row in deepest]
    assert [bar.value for bar in offload_planning.bars(reference + deepest)] == [3.5 / 2, 3.5]


def test_deep_chain_goes_below_recomputing_once() -> None:
    result = deep.run(layers=6, batch=2, length=32)
    rows = {row.way: row for row in result.rows if isinstance(row, DeepRow)}
    assert list(rows) == [deep.PLAIN, deep.BORDERS, deep.ONCE, deep.OFTEN]
    plain, once, often = rows[deep.PLAIN], rows[deep.ONCE], rows[deep.OFTEN]
    assert often.peak_bytes < once.peak_bytes < plain.peak_bytes
    assert plain.recompute_share == 0 < once.recompute_share
    assert once.most_runs == 1 < often.most_runs and often.repeated > 0
    assert deep.ONCE in shown(result)


def test_a_block_beside_its_optimum() -> None:
    result = optimum.run({"vit": budgets.MODELS["vit"]}, parts=(0.5, 0.85))
    rows = [row for row in result.rows if isinstance(row, OptimumRow)]
    assert len(rows) == 2
    for row in rows:
        assert row.optimum_s is not None and 0 < row.optimum_s <= row.auto_s <= row.layered_s
        assert row.excess(row.optimum_s) == 0.0
    assert all(bar.met for bar in result.bars)
    assert "vit, one block" in shown(result)


@pytest.mark.slow
def test_plans_stand_beside_those_of_sac_milp() -> None:
    pytest.importorskip("pulp")
    pytest.importorskip("pwlf")
    result = sac_milp.run((0.2, 0.6), layers=2)
    assert all(bar.met for bar in result.bars)
    for row in result.rows:
        assert isinstance(row, SacRow)
        assert row.ours.peak_bytes == row.ours.claimed_bytes <= row.budget_bytes


def test_what_sac_milp_exceeds_is_marked() -> None:
    row = SacRow(1_000, Ran(1_000, 1_007, 0.25), Ran(990, 990, 0.125))
    none = SacRow(800, None, Ran(790, 790, 0.5))
    console = Console(width=150, record=True)
    run.show(Result("sac-milp", "beside", (row, none), tuple(sac_milp._bars([row, none]))), console)
    shown = console.export_text()
    assert "!1,007" in shown and "25.0" in shown and "no plan" in shown and "missed" not in shown


def test_a_published_speed_stands_beside_a_plan_on_paper() -> None:
    tiny = {**published.PUBLISHED[0].config, "num_hidden_layers": 1, "vocab_size": 100}
    one = replace(published.PUBLISHED[0], config=tiny, length=64, tokens_per_s=1e4)
    result = published.run([one])
    (row,) = result.rows
    assert isinstance(row, PublishedRow) and row.planned_tokens_per_s > 0
    slower = replace(one, device=replace(one.device, bytes_per_s=2e11))
    (other,) = published.run([slower]).rows
    assert isinstance(other, PublishedRow)
    assert other.planned_tokens_per_s < row.planned_tokens_per_s
    assert replace(row, published_tokens_per_s=2 * row.planned_tokens_per_s).off == 1.0
    assert one.what in shown(result) and len(result.bars) == 1


@pytest.mark.slow
def test_inductors_steps_are_timed_at_each_of_stocks_peaks() -> None:
    models = {"resnet": budgets.MODELS["resnet"]}
    result = inductor_times.run(models, stock_budgets=(1.0,), rounds=1)
    names = [row.variant.rsplit(": ", 1)[1] for row in result.rows if isinstance(row, TimingRow)]
    assert names == ["stock", "ours"] * (len(names) // 2) and names
    assert "stock" in shown(result)


def tuning_row(microbatch: int, swept_per_s: float, measured: bool, chosen: bool) -> TuningRow:
    measured_per_s = swept_per_s if measured else None
    return TuningRow(
        "small", "eager", microbatch, 1, 1, 2, 0.0, 1.0, measured_per_s, swept_per_s, chosen
    )


def test_tuning_has_bars_for_the_choice_and_for_what_it_measured() -> None:
    near = [tuning_row(n, 100.0 + n, n == 4, n == 4) for n in (1, 2, 4, 8)]
    assert [bar.met for bar in tuning.bars_of("small", near)] == [True, True]
    far = [tuning_row(n, 100.0 * n, n < 4, n == 2) for n in (1, 2, 4, 8)]
    assert [bar.value for bar in tuning.bars_of("small", far)] == [4.0, 0.5]
    result = Result("tuning", "tuning", tuple(near), tuning.bars_of("small", near))
    assert "chosen" in shown(result)


@pytest.mark.slow
def test_tuning_beside_a_sweep_of_a_small_model() -> None:
    make = seeded(lambda: (stack(_block, _block)(), ()))
    subject = tuning.Subject(lambda: make()[0], lambda count: (torch.randn(count, 64),), 4, roomy=2)
    result = tuning.run({"small": subject}, rounds=1)
    rows = [row for row in result.rows if isinstance(row, TuningRow)]
    assert {row.way for row in rows} == set(tuning.WAYS) and sum(row.chosen for row in rows) == 1
    assert all(row.swept_per_s > 0 and row.peak_bytes <= row.total_bytes for row in rows)


@pytest.mark.slow
def test_ways_of_offloading_are_timed_within_their_budget() -> None:
    result = offload_ways.run(small, parts=(0.6,), rounds=1)
    rows = [row for row in result.rows if isinstance(row, WayRow)]
    ways = [row.way for row in rows]
    assert ways[:2] == [offload_ways.JOINT, offload_ways.ALONE] and "offload only" in ways
    assert all(row.measured_bytes <= row.budget_bytes and row.measured_s > 0 for row in rows)
    assert all(row.moved_bytes and not row.recompute_s for row in rows[2:])
    assert offload_ways.JOINT in shown(result)


def test_an_unknown_benchmark_is_refused() -> None:
    with pytest.raises(SystemExit, match="planning"):
        run.main(["plannig"])


@pytest.mark.slow
def test_budgets_are_met_with_less_recomputation_than_torchs() -> None:
    result = budgets.run({"gpt2-12L": budgets.MODELS["gpt2-12L"]}, budgets=(0.3, 0.1))
    assert len(result.rows) == 2
    met = {bar.what: bar.met for bar in result.bars}
    # Both settings are on torch's front, so that the bar for every setting's median is not theirs.
    assert all(found for what, found in met.items() if not what.endswith("torch, median")), met
