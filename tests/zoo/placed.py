"""Every placement, with numbers that fit small models, and the models they are tried on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from torch import nn

import ckpt_pass
from ckpt_pass import (
    AutoMemory,
    ByName,
    HeavyOps,
    Megatron,
    OptimalSegments,
    Segments,
    from_deepspeed,
    from_torchtitan,
)
from tests.zoo import Case, hf
from tests.zoo.modular import TRANSFORMER, UNET

SIX = [case for case in hf.CASES if case.bitwise_repeats]
CASES = [*SIX, UNET, TRANSFORMER]
TRANSFORMERS = [case for case in CASES if case.draws_random]


def is_large(module: nn.Module) -> bool:
    return sum(p.numel() for p in module.parameters(recurse=False)) > 500


PLACEMENTS: Mapping[str, Any] = {
    **{
        name: name
        for name in (
            "none", "all", "alternate", "every-3", "layers-0,-1", "auto-100", "sqrt-segments",
            "segments-1", "segments-2", "megatron-full",
        )
    },
    "segments-2-nested": Segments(2, nested=True),
    "by-name": ByName("*.0"),
    "custom": is_large,
    "heavy-ops": HeavyOps(linear_features=1, conv_weights=1),
    "megatron-uniform-2": Megatron("full", "uniform", 2),
    "megatron-block-1": Megatron("full", "block", 1),
    "deepspeed": from_deepspeed({"number_checkpoints": 2}),
    "torchtitan-2": from_torchtitan({"mode": "selective", "selective_ac_option": "2"}),
    "torchtitan-op": from_torchtitan({"mode": "selective", "selective_ac_option": "op"}),
}  # fmt: skip
"""Placements that fit every case, by a short name."""


@functools.cache
def profiles(case: Case) -> tuple[ckpt_pass.LayerProfile, ...]:
    model, inputs = case.make()
    return ckpt_pass.profile_layers(model, *inputs, rounds=1)


def auto_memory(case: Case) -> AutoMemory:
    return AutoMemory(0.8, profiles(case))


def optimal_segments(case: Case) -> OptimalSegments:
    """Segments of the least peak there is."""
    found = profiles(case)
    with pytest.raises(ckpt_pass.InfeasibleBudgetError) as caught:
        ckpt_pass.plan_segments(found, 1)
    return OptimalSegments(caught.value.least_feasible_bytes, found)


MEASURED: Mapping[str, Callable[[Case], Any]] = {
    "auto-memory": auto_memory,
    "optimal-segments": optimal_segments,
}
"""Placements that are made for a case from its measured layers."""


def placed(name: str, case: Case) -> Any:
    """The placement of that name, for a case."""
    return MEASURED[name](case) if name in MEASURED else PLACEMENTS[name]
