"""The benchmarks run and give well-formed rows; their exact byte counts hold. No timing here."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks import budgets, eager_cost, partition_cost, peaks, run
from benchmarks.common import Bar, PeakRow, Result, TimingRow, Variant, interleave
from ckpt_pass.flops import FlopCounter
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


def test_eager_cost_times_every_variant() -> None:
    result = eager_cost.run(rounds=3, warmup=0, blocks=2)
    assert_timed(result, list(eager_cost.ways()), rounds=3)
    assert all(bar.limit == 1.0 for bar in result.bars)


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


def test_results_are_shown_and_saved(tmp_path: Path) -> None:
    row = PeakRow("model", "ours", peak_bytes=3, saved_bytes=2, flops=1)
    bars = (Bar("met", 3, 4, "bytes"), Bar("not met", 1.5, 1.0))
    result = Result("peaks", "Peaks", (row,), bars)
    with (console := Console(width=run.PIPED_WIDTH)).capture() as shown:
        run.show(result, console)
    assert "missed  not met: 1.500 <= 1.00" in shown.get()
    data = json.loads(run.save(result, tmp_path / "results").read_text(encoding="utf-8"))
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


@pytest.mark.slow
def test_budgets_are_met_with_less_recomputation_than_torchs() -> None:
    result = budgets.run(models=("gpt2-12L",), budgets=(0.3, 0.1))
    assert len(result.rows) == 2
    assert all(bar.met for bar in result.bars)
