"""Step times at the same peak: torch at settings of its budget, ours with its peak as the budget.

Both are the compiled ``aot_eager`` step on one thread, timed in turn, so that what else the machine
does meets both alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch._functorch.config as functorch_config

import ckpt_pass
from benchmarks.budgets import MODELS, Models, made
from benchmarks.common import (
    Bar,
    BudgetRow,
    Result,
    TimingRow,
    Variant,
    interleave,
    torch_threads,
)
from tests.zoo import Built

ROUNDS = 9
TORCH, OURS = "torch", "ours"


def run(points: Sequence[BudgetRow], rounds: int = ROUNDS, models: Models = MODELS) -> Result:
    """Time the points that are on torch's front, each peak once.

    Args:
        points: what :func:`benchmarks.budgets.run` measured.
        rounds: timings of either step.
        models: by the names that the points have.
    """
    front = {
        (row.label, row.torch.peak_bytes): row
        for row in points
        if row.on_front and row.torch is not None and row.ours is not None
    }
    with torch_threads(1):
        rows = tuple(
            row for point in front.values() for row in _pair(point, rounds, models[point.model])
        )
    ratios = [row.ratios[TORCH] for row in rows if row.variant.endswith(OURS)]
    lower, middle, upper = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    what = f"step time, ours / torch, median (quartiles {lower:.2f} .. {upper:.2f})"
    return Result(
        name="budget-times",
        title="the step at the same peak, torch and ours (aot_eager, CPU)",
        rows=rows,
        bars=(Bar(what, middle, 1.0),),
    )


def _pair(point: BudgetRow, rounds: int, make: Callable[[], Built]) -> Iterator[TimingRow]:
    assert point.torch is not None
    dtype = getattr(torch, point.dtype)
    torch._dynamo.reset()
    with functorch_config.patch(activation_memory_budget=point.torch_budget):
        theirs = _variant(TORCH, made(make, dtype), "aot_eager")
    ours = ckpt_pass.make_backend(budget=point.torch.peak_bytes, inner="aot_eager")
    variants = [theirs, _variant(OURS, made(make, dtype), ours)]
    where = f"{point.label} {point.torch.peak_bytes / 1e6:.1f} MB"
    for row in interleave(variants, rounds=rounds, warmup=1, references=(TORCH,)):
        yield replace(row, variant=f"{where}: {row.variant}")
    torch._dynamo.reset()


def _variant(name: str, built: Built, backend: Any) -> Variant:
    module, inputs = built
    compiled: Callable[..., torch.Tensor] = torch.compile(module, backend=backend, fullgraph=True)

    def step(_: None) -> None:
        compiled(*inputs).backward()

    step(None)  # compiles, here: what is patched around it is not when it is timed
    return Variant(name, step, lambda: module.zero_grad(set_to_none=True))
