"""Step times with Inductor at the same peak: stock torch's settings, and ours with its peak.

Stock is each distinct peak that a setting of ``activation_memory_budget`` reaches, and a checkpoint
on every block, compiled. Ours gets that peak as its budget. Both are timed in turn on one thread.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import nn

import ckpt_pass
from benchmarks.budgets import TORCH_BUDGETS, Models, made
from benchmarks.common import Bar, Result, TimingRow, Variant, interleave, torch_threads
from tests.zoo import Built, checkpoint_blocks, loss_of

ROUNDS = 9
STOCK, OURS = "stock", "ours"
#: What is longer in one run of nine may be as long in the next.
NO_LONGER = 1.02


def run(
    models: Models,
    stock_budgets: Sequence[float] = TORCH_BUDGETS,
    dtype: torch.dtype = torch.float32,
    rounds: int = ROUNDS,
) -> Result:
    """Time every peak of stock's on every model.

    Args:
        models: what makes each model.
        stock_budgets: settings of torch's own budget.
        dtype: of the models.
        rounds: timings of either step.
    """
    rows: list[TimingRow] = []
    with torch_threads(1):
        for name, make in models.items():
            label = name if dtype == torch.float32 else f"{name} {dtype}".replace("torch.", "")
            rows += _of_model(label, lambda make=make: made(make, dtype), stock_budgets, rounds)  # type: ignore[misc]
    ratios = [row.ratios[STOCK] for row in rows if row.variant.endswith(OURS)]
    return Result(
        name="inductor-times",
        title="the step at the same peak, stock Inductor and ours (CPU)",
        rows=tuple(rows),
        bars=(
            Bar("step time, ours / stock, median", statistics.median(ratios), 0.95),
            Bar("step time, ours / stock, worst", max(ratios), NO_LONGER),
        ),
    )


def _of_model(
    label: str, make: Callable[[], Built], stock_budgets: Sequence[float], rounds: int
) -> Iterator[TimingRow]:
    found: dict[int, tuple[str, Variant]] = {}
    for budget in stock_budgets:
        with functorch_config.patch(activation_memory_budget=budget):
            torch._dynamo.reset()
            theirs, peak_bytes = _stock(make())
        found.setdefault(peak_bytes, (f"at {budget:g}", theirs))
    blocks = make()
    names = _blocks_of(blocks[0])
    if names:
        torch._dynamo.reset()
        checkpoint_blocks(blocks[0], names)
        theirs, peak_bytes = _stock(blocks)
        found[peak_bytes] = ("checkpoint on each block", theirs)
    for peak_bytes, (what, theirs) in sorted(found.items(), reverse=True):
        torch._dynamo.reset()
        backend = ckpt_pass.make_backend(budget=peak_bytes, inner="inductor")
        ours = _variant(OURS, make(), backend)
        where = f"{label} {peak_bytes / 1e6:.3f} MB, {what}"
        for row in interleave([theirs, ours], rounds=rounds, warmup=1, references=(STOCK,)):
            yield replace(row, variant=f"{where}: {row.variant}")


def _blocks_of(module: nn.Module) -> list[str]:
    """The entries of the longest list of modules."""
    lists = [(name, one) for name, one in module.named_modules() if isinstance(one, nn.ModuleList)]
    if not lists:
        return []
    name, longest = max(lists, key=lambda named: len(named[1]))
    return [f"{name}.{number}" for number in range(len(longest))]


def _stock(built: Built) -> tuple[Variant, int]:
    """Stock Inductor's step, and its peak."""
    variant = _variant(STOCK, built, "inductor")
    module, _ = built
    measured = ckpt_pass.measure_step(
        lambda: variant.run(None), warmup=0, repeats=1, params=module.parameters()
    )
    module.zero_grad(set_to_none=True)
    return variant, measured.peak_bytes


def _variant(name: str, built: Built, backend: Any) -> Variant:
    module, inputs = built
    compiled: Callable[..., torch.Tensor] = torch.compile(module, backend=backend, fullgraph=True)

    def step(_: None) -> None:
        loss_of(compiled(*inputs)).backward()

    step(None)  # compiles, here: what is patched around it is not when it is timed
    module.zero_grad(set_to_none=True)
    return Variant(name, step, lambda: module.zero_grad(set_to_none=True))
