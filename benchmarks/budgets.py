"""Our budgets beside torch's ``activation_memory_budget``: the same peak, how much recomputation.

For each peak that torch's own budget reaches, ours gets that peak as its budget. Peaks are measured
(allocation events), flops are counted on the ops that really run; both are exact.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._functorch.config as functorch_config

import ckpt_pass
from benchmarks.common import Bar, BudgetRow, Result, torch_threads
from tests.zoo import hf

#: torch's knob, from "recompute only what is nearly free" to "recompute everything".
TORCH_BUDGETS = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05, 0.02, 0.0)
MODELS: dict[str, Callable[[], Any]] = {"llama-16L": hf.llama_16l, "gpt2-12L": hf.gpt2_12l}


def _measured(module: Any, inputs: Any, backend: Any) -> ckpt_pass.Measurement:
    torch._dynamo.reset()
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    return ckpt_pass.measure_step(lambda: compiled(*inputs), warmup=1, repeats=1)


def run(
    models: tuple[str, ...] = tuple(MODELS), budgets: tuple[float, ...] = TORCH_BUDGETS
) -> Result:
    """Measure every point, torch and ours in turn."""
    with torch_threads(1):
        rows = tuple(_points(models, budgets))
    ratios = [row.ratio for row in rows]
    over = max(row.ours_peak_bytes - row.torch_peak_bytes for row in rows)
    return Result(
        name="budgets",
        title="the same peak: torch's activation_memory_budget and ours (aot_eager, CPU)",
        rows=rows,
        bars=(
            Bar("measured peak over the budget, worst", over, 0, "bytes"),
            Bar("recomputed flops, ours / torch, worst", max(ratios), 1.0),
            Bar("recomputed flops, ours / torch, median", statistics.median(ratios), 0.45),
        ),
    )


def _points(models: tuple[str, ...], budgets: tuple[float, ...]) -> Iterator[BudgetRow]:
    for name in models:
        module, inputs = MODELS[name]()
        plain = _measured(module, inputs, ckpt_pass.make_backend(budget="1TB", inner="aot_eager"))
        for budget in budgets:
            with functorch_config.patch(activation_memory_budget=budget):
                theirs = _measured(module, inputs, "aot_eager")
            backend = ckpt_pass.make_backend(budget=theirs.peak_bytes, inner="aot_eager")
            ours = _measured(module, inputs, backend)
            yield BudgetRow(
                model=name,
                torch_budget=budget,
                torch_peak_bytes=theirs.peak_bytes,
                torch_flops=theirs.flops,
                ours_peak_bytes=ours.peak_bytes,
                ours_flops=ours.flops,
                plain_flops=plain.flops,
            )
