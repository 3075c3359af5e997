"""A plan in words and as a picture: what it says of itself, and memory over the step."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckpt_pass
from ckpt_pass.plans.text import LINES
from ckpt_pass.plans.timeline import Timeline, text_plot
from ckpt_pass.plans.wording import format_seconds
from tests.cli.test_cli import check_png

WIDTH, DEPTH, ROWS = 16, 4, 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def plan_net(budget: float | int | None) -> ckpt_pass.Plan:
    return ckpt_pass.plan(Net(), torch.randn(ROWS, WIDTH), budget=budget)


@cache
def tight() -> ckpt_pass.Plan:
    """The plan with the least peak: it recomputes something that takes time."""
    with pytest.raises(ckpt_pass.InfeasibleBudgetError) as caught:
        plan_net(1)
    found = plan_net(caught.value.least_feasible_bytes)
    assert found.recompute_time_s > 0
    return found


# --- what a plan knows --------------------------------------------------------------------------


def test_the_timelines_are_those_of_the_two_steps() -> None:
    plan, plain = tight(), plan_net(1.0)
    assert plan.plain_timeline is not None
    assert plan.timeline.peak_bytes == plan.peak_bytes
    assert plan.timeline.duration_s == pytest.approx(plan.step_time_s + plan.recompute_time_s)
    assert plan.plain_timeline.duration_s == pytest.approx(plan.step_time_s)
    assert plan.plain_timeline.peak_bytes == plain.budget_bytes
    assert plan.timeline.forward_length == plan.plain_timeline.forward_length
    assert plan_net(None).plain_timeline is None


def test_what_runs_again_costs_what_the_plan_says() -> None:
    plan = tight()
    again = sum(decision.time_s * decision.times for decision in plan.with_fate("recomputed"))
    assert again == pytest.approx(plan.recompute_time_s)


def test_plans_are_values() -> None:
    assert tight() == plan_net(tight().budget_bytes)
    assert hash(tight()) == hash(plan_net(tight().budget_bytes))
    assert tight() != plan_net(1.0)


def test_the_gap_is_measured_against_the_bound() -> None:
    plan = _timed(status="feasible", step_time_s=6.0, recompute_time_s=2.0)
    assert _proven(plan, lower_bound_s=0.0).gap == 2 / 8
    assert _proven(plan, lower_bound_s=1.0).gap == 1 / 8
    assert _proven(plan, lower_bound_s=0.0, status="optimal").gap == 0.0


def _timed(status: str, step_time_s: float, recompute_time_s: float) -> ckpt_pass.Plan:
    plan = tight()
    times = {"step_time_s": step_time_s, "recompute_time_s": recompute_time_s}
    return _proven(replace(plan, predicted=replace(plan.predicted, **times)), status=status)


def _proven(plan: ckpt_pass.Plan, **how: Any) -> ckpt_pass.Plan:
    return replace(plan, proven=replace(plan.proven, **how))


# --- words --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bound", "status", "words"),
    [
        (0.0, "feasible", "not known how far this is from the fastest plan"),
        (0.0, "time limit", "the solver stopped at its time limit"),
        (1.0, "feasible", "1.00 s of recomputation at least, 2.00 s here: the fastest plan's step"),
        (2.0, "optimal", "optimal: no plan within the budget recomputes less"),
    ],
)
def test_the_bound_in_words(bound: float, status: str, words: str) -> None:
    plan = _timed(status, step_time_s=6.0, recompute_time_s=2.0)
    assert words in _proven(plan, lower_bound_s=bound).summary()


def test_a_plan_that_recomputes_nothing_is_the_fastest() -> None:
    assert "no plan is faster" in _timed("feasible", 6.0, recompute_time_s=0.0).summary()


def test_the_overview_counts_every_decision() -> None:
    plan = tight()
    lines = plan.overview().splitlines()
    head = next(number for number, line in enumerate(lines) if line.endswith("why"))
    table = lines[head + 1 : lines.index("", head)]
    counted = sum(int(number) for line in table for number in line[16:29].split())
    assert counted == len(plan.decisions)
    assert str(plan) == plan.overview()


def test_layers_that_decide_alike_share_a_line() -> None:
    text = plan_net(1.0).overview()
    assert f"{DEPTH} x layers.*.up aten.addmm.default" in text
    assert "layers.0.up" not in text


def test_the_dearest_decisions_come_first_and_are_few() -> None:
    decisions = tuple(
        replace(decision, site=replace(decision.site, op=f"op{number}"), time_s=1e-3 * number)
        for number, decision in enumerate(tight().with_fate("recomputed"), start=1)
    )
    assert len(decisions) > LINES
    lines = replace(tight(), decisions=decisions).overview().splitlines()
    start = lines.index("recomputed, most time first") + 1
    ranked = lines[start : lines.index("", start)]
    assert len(ranked) == LINES + 1
    assert ranked[0].startswith(f"  {format_seconds(1e-3 * len(decisions)):>10}    1 x ")
    assert ranked[-1] == f"  and {len(decisions) - LINES} that cost less"


def test_what_runs_more_than_once_says_how_often() -> None:
    (decision,) = tight().with_fate("recomputed")[:1]
    often = replace(decision, times=5, time_s=2e-3, op_class="matmul", nbytes=1024)
    text = replace(tight(), decisions=(often,)).overview()
    assert "up to 5 times        1      0     1.0 KiB" in text
    assert f"10.00 ms    1 x {often.site} in 5 runs" in text


def test_without_a_budget_the_overview_is_the_summary() -> None:
    plan = plan_net(None)
    assert plan.overview() == plan.summary()
    assert "bound" not in plan.summary()


# --- memory over time ---------------------------------------------------------------------------

MIB = 2**20
#: Half a second up to 8 MiB, half a second down.
HILL = Timeline((2 * MIB, 4 * MIB, 8 * MIB, 4 * MIB), 2, (0.25, 0.25, 0.25, 0.25))


def test_a_plot_of_characters() -> None:
    assert text_plot(HILL, 8 * MIB, width=16, height=4) == [
        " " * 18 + "▼ peak 8.0 MiB",
        "8.0      ┤╌╌╌╌╌╌╌╌████╌╌╌╌ budget 8.0 MiB",
        "6.0      ┤        ████",
        "4.0      ┤    ████████████",
        "2.0      ┤████████████████",
        "MiB      └────────┴───────",
        "          forward",
    ]


def test_a_peak_shorter_than_a_column_is_seen() -> None:
    timeline = Timeline((MIB, 9 * MIB, MIB), 1, (1.0, 0.0, 1.0))
    assert max(timeline.columns(10)) == 9 * MIB
    assert timeline.columns(10)[0] == timeline.columns(10)[-1] == MIB


def test_a_budget_far_above_is_no_line() -> None:
    assert not any("budget" in line for line in text_plot(HILL, 80 * MIB))
    assert any("budget 9.0 MiB" in line for line in text_plot(HILL, 9 * MIB))


def test_a_step_without_time_or_bytes_has_no_plot() -> None:
    assert text_plot(Timeline((), 0, ())) == []
    assert text_plot(Timeline((0, 0), 1, (1.0, 1.0))) == []


def test_every_line_keeps_to_the_width() -> None:
    lines = text_plot(tight().timeline, width=40, height=5)
    assert len(lines) == 5 + 3
    assert all(len(line) <= 40 + 10 for line in lines[1:])
    assert "▼" in lines[0] and "┴" in lines[-2]


def test_the_plot_of_a_plan(tmp_path: Path) -> None:
    check_png(tight().plot(tmp_path / "budget.png"))
    check_png(plan_net(None).plot(str(tmp_path / "policy.png")))
