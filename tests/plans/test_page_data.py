"""What a plan's page holds, without a browser."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from functools import cache
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import ckpt_pass
from ckpt_pass.drawing import web
from ckpt_pass.drawing.figures import MissingExtraError
from ckpt_pass.planner.alive import KINDS, OTHERS
from ckpt_pass.plans.contents import Contents, layer_of
from ckpt_pass.plans.page_data import NO_CONTENTS

WIDTH, ROWS = 16, 64
#: A link on which moving beats every recomputation.
FAST = ckpt_pass.Offload(d2h_bytes_per_s=1e12, h2d_bytes_per_s=1e12)
#: A name that is markup if anybody takes it for that.
NAME = "<img src=x onerror=alert(1)> & \"'</script>"


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(nn.functional.gelu(self.up(x))))


class Net(nn.Module):
    def __init__(self, dropout: float = 0.1, cut: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(dropout) for _ in range(4))
        self.cut = cut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if self.cut and number == 1:
                torch._dynamo.graph_break()
        return x.square().mean()


def planned(model: nn.Module | None = None, **options: Any) -> Any:
    return ckpt_pass.plan(model or Net(), torch.randn(ROWS, WIDTH), **options)


@cache
def small(mode: str = "compiled") -> ckpt_pass.Plan:
    """A plan that recomputes, and has the account of a job."""
    model = Net()
    job = torch.optim.AdamW(model.parameters())
    found: ckpt_pass.Plan = planned(model, budget=0.6, optimizer=job, mode=mode)
    return found


def data_in(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(found)


def levels_in(graph: Mapping[str, Any]) -> tuple[int, ...]:
    """Bytes at each place as the lives in a page's data add up to them."""
    flat = graph["contents"]["lives"]
    change = [0] * (len(graph["contents"]["ran"]) + 1)
    for _, nbytes, first, more, _ in zip(*[iter(flat)] * 5, strict=True):
        change[first] += nbytes
        change[first + more + 1] -= nbytes
    return tuple(accumulate(change[:-1]))


def contents_of(plan: ckpt_pass.Plan) -> Contents:
    found = plan.predicted.contents
    assert found is not None
    return found


# --- what is alive ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"budget": 0.6},
        {"policy": "save-nothing"},
        {"budget": 0.6, "offload": FAST},
        {"budget": 0.6, "mode": "eager"},
        {"budget": 0.6, "mode": "eager", "offload": FAST},
    ],
    ids=("compiled", "policy", "compiled, moved", "eager", "eager, moved"),
)
def test_what_is_alive_adds_up_to_the_timeline(options: dict[str, Any]) -> None:
    plan = planned(**options)
    found = contents_of(plan)
    assert found.bytes_at() == plan.timeline.bytes_at
    kinds = {life.kind for life in found.lives}
    assert OTHERS not in kinds and {"gradient", "output", "backward"} <= kinds
    assert ("offloaded" in kinds) == bool(plan.predicted.offloaded)
    assert "recomputed" in kinds or plan.predicted.offloaded
    peak = plan.timeline.peak_index
    there = found.at(peak)
    assert sum(life.nbytes for life in there) == plan.timeline.peak_bytes
    assert sorted(-life.nbytes for life in there) == [-life.nbytes for life in there]
    assert found.running(peak).words.split()[-1].partition("#")[0] in plan.predicted.peak_at


def test_lives_say_what_was_decided() -> None:
    """A value held between forward and backward is one that the plan saves, and no other."""
    for mode in ("compiled", "eager"):
        plan = small(mode)
        found, border = contents_of(plan), plan.timeline.forward_length
        held = {found.name(life).words for life in found.at(border - 1) if life.kind == "saved"}
        assert held <= {str(item.site) for item in plan.saved.of_kind("activation")}
        assert held and {found.name(life).layer for life in found.at(border)} >= {"layers.0"}


def test_microbatches_lie_beside_the_step() -> None:
    plan = planned(Net(0.0), budget=0.8, mode="eager", in_flight=3)
    found = contents_of(plan)
    assert found.bytes_at() == plan.timeline.bytes_at
    others = [life for life in found.lives if life.kind == OTHERS]
    assert others and all(life.nbytes > 0 for life in others)
    assert found.name(others[0]).words == "beside this step"


@pytest.mark.parametrize(
    ("region", "fqn", "layer"),
    [
        (None, "model.layers.3.mlp.up", "model.layers.3"),
        (None, "0.down", "0"),
        (None, "head.norm", "head"),
        (None, "", ""),
        ("layers.0.blocks.1", "layers.0.blocks.1.up", "layers.0.blocks.1"),
    ],
)
def test_the_layer_of_an_op(region: str | None, fqn: str, layer: str) -> None:
    assert layer_of(region, fqn) == layer


# --- the page -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["compiled", "eager"])
def test_the_page_has_what_the_plan_has(mode: str, tmp_path: Path) -> None:
    plan = small(mode)
    data = data_in(plan.report(tmp_path / "plan.html"))
    (graph,) = data["graphs"]
    assert levels_in(graph) == plan.timeline.bytes_at
    assert plan.plain_timeline is not None
    for name, curve in (("timeline", plan.timeline), ("plain", plan.plain_timeline)):
        assert tuple(accumulate(graph[name]["changes"])) == curve.bytes_at
        assert sum(graph[name]["ns"]) == round(curve.duration_s * 1e9)
        assert graph[name]["forward"] == curve.forward_length
    rows = data["decisions"]["rows"]
    assert [row[2] for row in rows] == [str(decision.site) for decision in plan.decisions]
    assert [data["decisions"]["fates"][row[4]] for row in rows] == [d.fate for d in plan.decisions]
    assert [row[5] for row in rows] == [decision.nbytes for decision in plan.decisions]
    assert plan.account is not None
    for phase, found in zip(plan.account.phases, data["account"]["phases"], strict=True):
        assert sum(nbytes for _, nbytes in found["parts"]) == found["peak"] == phase.peak_bytes
    assert ["policy", plan.policy] in data["facts"]
    assert [(point[0], point[2]) for point in data["curve"]["points"]] == [
        ("this plan", plan.peak_bytes),
        ("planned", plan.plain_timeline.peak_bytes),
    ]


def test_the_same_plan_gives_the_same_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    one = planned(Net(0.0), budget=0.7).report(tmp_path / "one.html").read_bytes()
    again = planned(Net(0.0), budget=0.7).report(tmp_path / "again.html").read_bytes()
    assert one == again


def test_the_page_refers_to_nothing_outside(tmp_path: Path) -> None:
    """Its own markup, that is; the plotting library's text names addresses that it never asks."""
    text = small().report(tmp_path / "plan.html").read_text(encoding="utf-8")
    scripts = re.compile(r"<script[^>]*>.*?</script>", re.S)
    assert len(scripts.findall(text)) == 3
    rest = scripts.sub("", text)
    assert "http" not in rest and "src=" not in rest and "url(" not in rest


def test_every_kind_has_words_and_a_colour() -> None:
    script = (Path(web.__file__).parent / "page" / "script.js").read_text(encoding="utf-8")
    assert all(f'"{kind}": [' in script and f'"{kind}": "' in script for kind in KINDS)


def test_names_are_no_markup(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module(NAME, nn.Linear(WIDTH, WIDTH))
    model.add_module("loss", nn.Flatten(0))
    plan = planned(model, policy=ckpt_pass.save(op="aten.addmm", label=NAME), loss_fn=torch.sum)
    assert any(NAME in decision.rule for decision in plan.decisions)
    path = plan.report(tmp_path / "plan.html")
    assert "<img" not in path.read_text(encoding="utf-8")
    assert NAME in data_in(path)["decisions"]["rules"]


def test_a_plan_from_a_file_says_what_it_lacks(tmp_path: Path) -> None:
    loaded = ckpt_pass.Plan.from_json(small().to_json())
    assert loaded == small() and loaded.predicted.contents is None
    (graph,) = data_in(loaded.report(tmp_path / "plan.html"))["graphs"]
    assert graph["contents"] is None and graph["note"] == NO_CONTENTS
    assert tuple(accumulate(graph["timeline"]["changes"])) == small().timeline.bytes_at


def test_a_step_of_several_graphs(tmp_path: Path) -> None:
    plan = planned(Net(0.0, cut=True), budget=0.8)
    assert isinstance(plan, ckpt_pass.StepPlan)
    data = data_in(plan.report(tmp_path / "plan.html"))
    assert [graph["name"] for graph in data["graphs"]] == ["graph 0", "graph 1"]
    for graph, part in zip(data["graphs"], plan.parts, strict=True):
        assert levels_in(graph) == part.timeline.bytes_at
    assert {row[0] for row in data["decisions"]["rows"]} == {0, 1}
    assert data["curve"]["points"][0][2] == plan.peak_bytes


def test_open_sizes_are_shown_as_they_are(tmp_path: Path) -> None:
    plan = planned(Net(0.0), budget=0.9, dynamic=True)
    rows = data_in(plan.report(tmp_path / "plan.html"))["decisions"]["rows"]
    assert any(row[5] == -1 and "s" in row[6] for row in rows)


# --- the trade-off, and what goes wrong ---------------------------------------------------------


def test_points_of_the_trade_off(tmp_path: Path) -> None:
    plan = small()
    others = [planned(budget=0.8), planned(budget=0.7)]
    points = data_in(plan.report(tmp_path / "a.html", curve=others))["curve"]["points"]
    assert [point[0] for point in points] == ["this plan", *["planned"] * 3]
    assert [point[2] for point in points[2:]] == [other.peak_bytes for other in others]
    found = plan.predicted
    assert points[0][3] == round(found.recompute_time_s / found.step_time_s, 6)
    row = ckpt_pass.SweepRow("torch", "budget 0.5", peak_bytes=7, recompute_share=0.25)
    failed = ckpt_pass.SweepRow("torch", "budget 0", failure="no")
    measured = SimpleNamespace(rows=(row, failed))
    data = data_in(plan.report(tmp_path / "b.html", curve=measured))["curve"]
    assert data["points"][-1] == ["torch", "budget 0.5", 7, 0.25] and len(data["points"]) == 3
    assert data["points"][0][3] == round(found.recompute_flops / found.step_flops, 6)


@pytest.mark.parametrize("curve", [3, "0.5", [0.5]])
def test_what_is_no_curve_is_refused(curve: Any, tmp_path: Path) -> None:
    with pytest.raises(ckpt_pass.InvalidCurveError, match="expected what ckpt_pass"):
        small().report(tmp_path / "plan.html", curve=curve)
    assert not (tmp_path / "plan.html").exists()


def test_without_plotly_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ckpt_pass\[report\]'"):
        small().report(tmp_path / "plan.html")
