"""Compiled plans of models that FSDP2 shards: dynamo cuts the step at each unit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

import ckpt_pass
from tests.distributed.ranks import batch, made, trained
from tests.distributed.test_simulated_ranks import sharded

pytestmark = pytest.mark.distributed
MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


@pytest.mark.parametrize(
    ("how", "part"),
    [
        pytest.param({}, 0.65, id="sharded again"),
        pytest.param({}, 0.9, id="wide", marks=pytest.mark.slow),
        pytest.param({"reshard_after_forward": False}, 0.8, id="kept", marks=pytest.mark.slow),
        pytest.param({"mp_policy": MIXED}, 0.95, id="mixed precision", marks=pytest.mark.slow),
    ],
)
def test_what_a_rank_gathers_is_in_the_peak(
    two_ranks: None, how: dict[str, Any], part: float
) -> None:
    """FSDP takes and gives back the memory of gathered parameters: no graph has them."""
    model, inputs = sharded(made(), **how), batch(0)
    params = list(model.parameters())
    plain = ckpt_pass.measure_step(lambda: model(inputs), params=params, repeats=1).peak_bytes
    plan = ckpt_pass.plan(model, inputs, budget=int(part * plain))
    assert isinstance(plan, ckpt_pass.StepPlan)
    compiled = torch.compile(model, backend=ckpt_pass.make_backend(plan=plan))
    step = ckpt_pass.measure_step(lambda: compiled(inputs), params=params, repeats=1)
    assert step.peak_bytes == plan.peak_bytes <= part * plain


def test_gradients(one_rank: None) -> None:
    """Losses and gradients of three steps, bit by bit; gloo gathers from one rank."""
    model = sharded(made())
    plain = ckpt_pass.plan(model, batch(0), budget=1.0)
    assert isinstance(plain, ckpt_pass.StepPlan)
    plan = ckpt_pass.plan(model, batch(0), budget=int(0.85 * plain.peak_bytes))
    assert any(part.with_fate("recomputed") for part in plan.parts)
    compiled = torch.compile(model, backend=ckpt_pass.make_backend(plan=plan))
    assert trained(compiled, 0) == trained(sharded(made()), 0)
