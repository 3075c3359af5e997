"""Strategies beside each other: measured, predicted, equal to the plain step, nothing left."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import ckpt_pass
from ckpt_pass import Comparison, Strategy, as_strategy, compare_strategies
from ckpt_pass.cli.commands import make_app
from ckpt_pass.report.page import write_report
from ckpt_pass.report.strategy_plots import plot_layers, plot_timelines, save_plots
from ckpt_pass.report.strategy_table import cells
from tests.cli.test_cli import check_png
from tests.plans.test_plan_text import DEPTH, ROWS, WIDTH, Net

X = torch.randn(ROWS, WIDTH)
STRATEGIES = ("none", "all", "alternate", "segments-2", "all:save-matmul", "budget=0.7")


@cache
def compared() -> tuple[Comparison, list[tuple[str, int, int]]]:
    told: list[tuple[str, int, int]] = []
    found = compare_strategies(
        Net(), X, strategies=STRATEGIES, rounds=1, progress=lambda *said: told.append(said)
    )
    return found, told


def found() -> Comparison:
    return compared()[0]


def test_every_strategy_is_the_plain_step() -> None:
    assert [row.name for row in found().rows] == list(STRATEGIES)
    for row in found().rows:
        assert row.loss_equal and row.equal and not row.failure, row
        assert row.time_s is not None and row.time_s > 0


def test_figures_are_those_of_the_steps() -> None:
    plain, every, alternate, segments, selective, budget = found().rows
    assert (plain.saving, plain.recompute_flops, plain.overhead) == (0.0, 0, 0.0)
    assert plain.peak_bytes and every.peak_bytes and budget.peak_bytes and plain.flops
    assert every.saving == 1 - every.peak_bytes / plain.peak_bytes > 0.2
    assert (every.regions, alternate.regions, segments.regions) == (DEPTH, -(-DEPTH // 2), 2)
    assert every.recompute_flops == every.flops - plain.flops  # type: ignore[operator]
    # A region makes its first product again; its last one's output is not needed.
    assert every.recompute_flops == DEPTH * 2 * ROWS * WIDTH * 4 * WIDTH
    assert every.recompute_share == every.recompute_flops / plain.flops
    assert selective.recompute_flops == 0
    assert budget.peak_bytes <= 0.7 * plain.peak_bytes


def test_peaks_are_predicted() -> None:
    """Within 0.1 %, the last region's kept product apart, which no backward asks for."""
    for row in found().rows:
        assert row.predicted_bytes and row.peak_bytes
        room = 4 * ROWS * WIDTH if row.name == "all:save-matmul" else 0.001 * row.peak_bytes
        assert abs(row.predicted_bytes - row.peak_bytes) <= room, row.name


def test_measured_alone_is_measured_beside_others() -> None:
    model = Net()
    with ckpt_pass.applied(model, "alternate"):
        alone = ckpt_pass.measure_step(lambda: model(X), repeats=1)
    row = found().of("alternate")
    assert (row.peak_bytes, row.saved_bytes, row.flops) == (
        alone.peak_bytes,
        alone.saved_bytes,
        alone.flops,
    )
    assert max(n for _, n in row.timeline) == row.peak_bytes
    assert row.backward_at_s is not None and 0 < row.backward_at_s < row.timeline[-1][0]


def test_progress_ends_where_it_said() -> None:
    _, told = compared()
    assert [name for name in STRATEGIES if name not in {what for what, _, _ in told}] == []
    assert told[-1][1] == told[-1][2]
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_the_front_has_what_nothing_beats() -> None:
    best = found().front
    for row in best:
        for other in found().rows:
            better = (other.peak_bytes or 0) < (row.peak_bytes or 0)
            assert not (better and (other.recompute_share or 0) <= (row.recompute_share or 0))
    assert {row.name for row in found().rows if row in best} == {
        line[0] for line in cells(found().rows) if line[-1] == "*"
    }


def test_the_table() -> None:
    text = str(found())
    for name in STRATEGIES:
        assert re.search(rf"^{re.escape(name)} .*equal  equal", text, re.MULTILINE), name
    with pytest.raises(ckpt_pass.UnknownStrategyError, match="Did you mean 'alternate'"):
        found().of("alternating")


def test_nothing_is_left_behind() -> None:
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)) for _ in range(3))
    )
    mark = torch.ones(8, 8)
    model[0][0].weight.grad = mark  # type: ignore[index, union-attr]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, state = torch.randn(4, 8), torch.get_rng_state()
    result = compare_strategies(
        model, x, strategies=["all", "budget=1KiB"], loss_fn=torch.sum, rounds=1
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[0][0].weight.grad is mark  # type: ignore[index, union-attr]
    assert not ckpt_pass.is_checkpointed(model)
    assert all("forward" not in vars(module) for module in model.modules())
    plain, every, budget = result.rows  # the plain step comes first, asked for or not
    assert plain.name == "none" and every.equal
    assert re.fullmatch(r"infeasible: at least [\d,]+ bytes", budget.failure)


def test_a_step_that_looks_at_values_has_a_prediction() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
                if float(x.sum().item()) > 1e9:
                    x = -x
            return x.sum()

    plain, every = compare_strategies(
        Branching(), torch.randn(4, 8), strategies=["all"], rounds=1
    ).rows
    assert plain.predicted_bytes == plain.peak_bytes
    assert every.predicted_bytes is not None
    assert every.equal


def test_a_model_without_layers_is_measured_plain() -> None:
    plain, every = compare_strategies(
        nn.Linear(4, 1), torch.randn(1, 4), strategies=["all"], loss_fn=torch.sum, rounds=1
    ).rows
    assert plain.peak_bytes and every.failure.startswith("No layers were found in Linear")


# --- what a strategy is ---------------------------------------------------------------------


def test_forms_of_a_strategy() -> None:
    assert as_strategy("all:save-matmul") == Strategy("all:save-matmul", "all", "save-matmul")
    assert as_strategy("save-matmul") == as_strategy(("all", "save-matmul"))
    assert as_strategy("budget=0.5") == Strategy("budget=0.5", budget=0.5)
    assert as_strategy("budget=6GiB").budget == "6GiB"
    assert as_strategy(ckpt_pass.EveryN(2)).placement == ckpt_pass.EveryN(2)
    named = Strategy("mine", ckpt_pass.EveryN(2))
    assert as_strategy(named) is named
    plan = ckpt_pass.plan(Net(), X, budget=0.7, mode="eager")
    assert as_strategy(plan).plan is plan


def test_wrong_strategies() -> None:
    with pytest.raises(ckpt_pass.UnknownPlacementError, match="Did you mean 'alternate'"):
        compare_strategies(Net(), X, strategies=["alternat"])
    with pytest.raises(ckpt_pass.UnknownPolicyError):
        as_strategy("all:save-nohting")
    with pytest.raises(ckpt_pass.InvalidBudgetError):
        as_strategy("budget=much")
    with pytest.raises(ckpt_pass.StrategyError, match="plan for compiled graphs"):
        as_strategy(ckpt_pass.plan(Net(), X))
    with pytest.raises(ckpt_pass.StrategyError, match="twice \\(all\\)"):
        compare_strategies(Net(), X, strategies=["all", "all"])
    with pytest.raises(ckpt_pass.StrategyError, match="rounds=0"):
        compare_strategies(Net(), X, strategies=["all"], rounds=0)
    model = Net()
    ckpt_pass.apply(model, "all")
    with pytest.raises(ckpt_pass.StrategyError, match="regions applied already"):
        compare_strategies(model, X)


# --- pictures and the page ------------------------------------------------------------------


def test_pictures(tmp_path: Path) -> None:
    profiles = ckpt_pass.profile_layers(Net(), X, rounds=1)
    for path in save_plots(found(), tmp_path / "plots", profiles):
        check_png(path)
        path.unlink()
    assert found().save_plots(tmp_path / "again")[0].name == "timelines.png"
    check_png(plot_timelines(found(), tmp_path / "two.png", ["none", "all"]))
    many = [replace(profiles[0], name=f"encoder.layers.{n}") for n in range(60)]
    check_png(plot_layers(many, tmp_path / "many.png"))


class _Links(HTMLParser):
    """Collects what a page refers to, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.text = ""
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    profiles = ckpt_pass.profile_layers(Net(), X, rounds=0)
    wild = replace(found(), model="<script>alert(1)</script>&")
    rows = [replace(row, name=f"<b>{row.name}</b>") for row in wild.rows]
    path = write_report(replace(wild, rows=tuple(rows)), tmp_path / "report.html", profiles)
    page = path.read_text()
    seen = _Links()
    seen.feed(page)
    assert len(seen.links) == 4
    assert all(link.startswith("data:image/png;base64,iVBOR") for link in seen.links)
    assert "script" not in seen.tags and "b" not in seen.tags and "link" not in seen.tags
    assert "<script>alert(1)</script>&" in seen.text and "<b>alternate</b>" in seen.text
    assert not re.search(r"https?://|@import|url\(", page)
    assert "layers.0" in seen.text


def test_the_command(tmp_path: Path) -> None:
    factory = tmp_path / "model.py"
    factory.write_text(
        "import torch\nfrom tests.plans.test_plan_text import ROWS, WIDTH, Net\n"
        "def made():\n    return Net(), torch.randn(ROWS, WIDTH)\n"
    )
    page, rows = tmp_path / "page.html", tmp_path / "rows.json"
    arguments = ["compare", f"{factory}:made", "-s", "all", "-s", "budget=0.7", "--rounds=1"]
    arguments += [f"--html={page}", f"--json={rows}", f"--plots={tmp_path / 'plots'}"]
    result = CliRunner().invoke(make_app(), arguments, env={"COLUMNS": "150"})
    assert result.exit_code == 0, result.stdout
    for word in ("none", "all", "budget=0.7", "wrote", "recomputed"):
        assert word in result.stdout
    assert page.stat().st_size > 50_000
    assert [row["name"] for row in json.loads(rows.read_text())["rows"]][1:] == [
        "all",
        "budget=0.7",
    ]
    assert len(list((tmp_path / "plots").iterdir())) == 4
    result = CliRunner().invoke(make_app(), ["compare", f"{factory}:made", "-s", "al"])
    assert result.exit_code == 1


def test_a_budget_over_running_statistics() -> None:
    """Layers with a batch normalisation are regions of a plan, and their statistics move once."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.Tanh())
            self.down = nn.Linear(64, 16)

        def forward(self, x: Tensor) -> Tensor:
            hidden: Tensor = self.down(self.body(x))
            return x + hidden

    model = nn.Sequential(*(Layer() for _ in range(4)))
    x = torch.randn(512, 16)
    plan = ckpt_pass.plan(model, x, budget=0.6, mode="eager", loss_fn=torch.sum)
    held = {name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm1d)}
    assert any(norm.startswith(f"{region}.") for region in plan.regions for norm in held)
    _, row = compare_strategies(model, x, strategies=[plan], loss_fn=torch.sum, rounds=1).rows
    assert row.equal  # buffers are compared, too
    assert row.peak_bytes is not None and row.saving is not None and row.saving >= 0.4
