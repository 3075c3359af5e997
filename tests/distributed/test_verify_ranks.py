"""``verify`` of a model that FSDP2 shards: it keeps what backward needs on itself, in forward."""

from __future__ import annotations

import pytest

import ckpt_pass
from tests.distributed.ranks import batch, made, trained
from tests.distributed.test_simulated_ranks import sharded

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("mode", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_promises_of_a_sharded_step(one_rank: None, mode: str) -> None:
    model = sharded(made())
    ckpt_pass.verify(model, batch(0), policy="save-nothing", mode=mode).raise_if_failed()
    plain = ckpt_pass.plan(model, batch(0), budget=1.0, mode=mode)
    budget = int(0.9 * plain.peak_bytes)
    ckpt_pass.verify(model, batch(0), budget=budget, mode=mode).raise_if_failed()
    assert trained(model, 0, steps=2) == trained(sharded(made()), 0, steps=2)
