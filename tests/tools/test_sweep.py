"""The trade-off curve: every point is measured, none is bent, and nothing is left behind."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import ckpt_pass
from ckpt_pass.report.sweeps import (
    BEST,
    BLOCKS,
    OURS,
    TORCH,
    SweepRow,
    cells,
    front,
    recompute_share,
    sweep_text,
)
from tests.cli.test_cli import check_png
from tests.plans.test_plan_text import DEPTH, ROWS, WIDTH, Net

X = torch.randn(ROWS, WIDTH)
SETTINGS = (1.0, 0.0)


Told = tuple[str, int, int]


@cache
def told_sweep() -> tuple[ckpt_pass.Sweep, list[Told]]:
    told: list[Told] = []
    found = ckpt_pass.sweep(
        Net(), X, points=3, rounds=1, torch_budgets=SETTINGS,
        progress=lambda *said: told.append(said),
    )  # fmt: skip
    return found, told


def whole() -> ckpt_pass.Sweep:
    return told_sweep()[0]


def test_every_family_is_there() -> None:
    found = whole()
    assert [row.family for row in found.rows] == ([OURS] * 3 + [TORCH] * len(SETTINGS) + [BLOCKS])
    assert [row.setting for row in found.of(BLOCKS)] == [f"{DEPTH} checkpoints"]
    assert all(row.time_s is not None and row.time_s > 0 for row in found.rows)
    assert (found.model, found.inner, found.device, found.rounds) == ("Net", "aot_eager", "cpu", 1)


def test_our_points_are_exact_and_rise() -> None:
    least, middle, plain = whole().of(OURS)
    for row in (least, middle, plain):
        assert row.peak_bytes == row.predicted_bytes
        assert row.budget_bytes is not None and row.peak_bytes is not None
        assert row.peak_bytes <= row.budget_bytes
    assert least.peak_bytes == least.budget_bytes  # the solver's own word for the least
    assert plain.recompute_share == 0.0
    assert least.budget_bytes < middle.budget_bytes < plain.budget_bytes  # type: ignore[operator]


def test_the_others_are_what_they_claim() -> None:
    """A checkpoint around a layer repeats one of its products at least, and both at most."""
    (blocks,) = whole().of(BLOCKS)
    product = 2 * ROWS * WIDTH * 4 * WIDTH
    plain = whole().of(OURS)[-1].flops
    assert plain is not None and blocks.flops is not None
    assert DEPTH * product <= blocks.flops - plain <= 2 * DEPTH * product
    assert blocks.recompute_share == (blocks.flops - plain) / plain
    shares = {row.setting: row.recompute_share for row in whole().of(TORCH)}
    assert shares["budget 1"] == 0.0
    assert shares["budget 0"] is not None and shares["budget 0"] > 0


def test_nothing_is_left_behind() -> None:
    model, x = Net(), X.clone().requires_grad_()
    first, second = model.layers[0], model.layers[1]
    own = first.forward
    first.forward = own  # type: ignore[method-assign]
    before, state = torch._functorch.config.get_config_copy(), torch.get_rng_state()
    mark = torch.ones(WIDTH, 4 * WIDTH).T
    first.up.weight.grad = mark
    found = ckpt_pass.sweep(model, x, points=2, rounds=1, torch_budgets=[0.5])
    assert [len(found.of(family)) for family in (OURS, TORCH, BLOCKS)] == [2, 1, 1]
    assert torch._functorch.config.get_config_copy() == before
    assert torch.equal(torch.get_rng_state(), state)
    assert vars(first)["forward"] is own and "forward" not in vars(second)
    assert first.up.weight.grad is mark
    assert x.grad is None and second.up.weight.grad is None


@pytest.mark.slow
def test_another_shape_is_compiled_anew() -> None:
    """The second sweep of a process has the same code at another shape: no size turns symbolic."""
    assert whole().rows
    x = torch.randn(2 * ROWS, WIDTH)
    found = ckpt_pass.sweep(Net(), x, points=2, rounds=1, with_torch=False)
    assert len(found.rows) == 2
    assert all(row.peak_bytes == row.predicted_bytes for row in found.rows)


def test_budgets_of_ones_own_and_those_that_do_not_fit() -> None:
    found = ckpt_pass.sweep(
        Net(), X, budgets=["1KiB", 0.9], rounds=1, with_torch=False, inner="aot_eager"
    )
    failed, near, plain = found.rows
    assert failed.budget_bytes == 1024 and failed.peak_bytes is None and failed.time_s is None
    assert re.fullmatch(r"infeasible: at least [\d,]+ bytes", failed.failure)
    assert near.peak_bytes is not None and plain.setting == "no recomputation"
    assert failed.failure in sweep_text(found.rows)


def test_a_loss_function_makes_the_step() -> None:
    layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
    found = ckpt_pass.sweep(
        layers, X, points=2, rounds=1, with_torch=False, loss_fn=lambda y: y.square().mean()
    )
    for row in found.rows:  # a loss of a few bytes may live a little longer than its last use
        assert row.peak_bytes is not None and row.predicted_bytes is not None
        assert abs(row.peak_bytes - row.predicted_bytes) <= 64


def test_progress_reaches_the_whole() -> None:
    _, told = told_sweep()
    done = [number for _, number, _ in told]
    assert done == sorted(done)
    assert told[-1][1] == told[-1][2] >= len(whole().rows)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"points": 1}, ckpt_pass.SweepArgumentError),
        ({"rounds": 0}, ckpt_pass.SweepArgumentError),
        ({"budgets": ["much"]}, ckpt_pass.InvalidBudgetError),
        ({"inner": "inducter"}, ckpt_pass.UnknownOptionError),
        ({"policy": "save-all-of-it"}, ckpt_pass.UnknownPolicyError),
    ],
)
def test_wrong_arguments(options: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        ckpt_pass.sweep(Net(), X, **options)


# --- tables and pictures ------------------------------------------------------------------------


def row(peak: int, share: float, family: str = OURS) -> SweepRow:
    return SweepRow(
        family, f"{peak}", peak_bytes=peak, flops=1, recompute_share=share, time_s=1.0 + share
    )


def test_the_front_is_what_nothing_beats() -> None:
    rows = [row(10, 0.3), row(12, 0.1), row(11, 0.4), row(14, 0.1), row(9, 0.3), row(20, 0.0)]
    failed = SweepRow(OURS, "1", failure="infeasible")
    assert front([*rows, failed], recompute_share) == (rows[5], rows[1], rows[4])


def test_the_table_marks_the_front() -> None:
    rows = (row(10, 0.3), row(20, 0.0), row(30, 0.2, TORCH))
    table = cells(rows)
    assert [line[0] for line in table] == [OURS, "", TORCH]
    assert [line[-1] for line in table] == [BEST, BEST, ""]
    assert table[1][4:7] == ("0.0 %", "1000.0", "1.00")
    assert cells((replace(rows[1], recompute_share=-1e-9),))[0][4] == "0.0 %"


def test_the_sweep_prints_and_saves() -> None:
    text = str(whole())
    assert all(row.setting in text for row in whole().rows)
    assert json.loads(json.dumps(asdict(whole())))["rows"][0]["family"] == OURS


def test_the_picture(tmp_path: Path) -> None:
    check_png(whole().plot(tmp_path / "curve.png"))
