"""Eager plans beside torch's selective checkpointing with every list of the usual ops.

For each model every subset of the usual lists is tried as torch's op list, on each block; the ones
that no other beats in peak and recomputation are kept, and a plan is made for each one's measured
peak. Flops are counted; the time of torch's recomputation is modelled as a plan's is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, pairwise
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import ckpt_pass
from benchmarks.common import MATMUL_OPS, Bar, EagerRow, Result
from ckpt_pass.eager.describe import eager_problem
from ckpt_pass.eager.trace import trace_step
from ckpt_pass.planner.eager_parts import EagerPlan
from ckpt_pass.planner.eager_problem import EagerProblem
from tests.zoo import Built, checkpoint_blocks, children_of, hf

_aten = torch.ops.aten
#: What users put on such lists: products, attention, and what is dear to make again besides.
LISTS: dict[str, tuple[Any, ...]] = {
    "matmuls": MATMUL_OPS,
    "attention": (
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._safe_softmax.default,
        _aten._softmax.default,
    ),
    "norms": (
        _aten.native_layer_norm.default,
        _aten.native_batch_norm.default,
        _aten.rsqrt.default,
    ),
    "activations": (_aten.gelu.default, _aten.silu.default, _aten.tanh.default, _aten.relu.default),
}

#: A checkpoint around each block, without a list.
NOTHING_SAVED = "torch, nothing saved"


@dataclass(frozen=True)
class Model:
    """A model and the names of its blocks."""

    name: str
    make: Callable[[], Built]
    blocks: Callable[[nn.Module], list[str]]


SMALL = (
    Model("gpt2", hf.gpt2, children_of("model.transformer.h")),
    Model("llama", hf.llama, children_of("model.model.layers")),
    Model("mixtral", hf.mixtral, children_of("model.model.layers")),
    Model("bert", hf.bert, children_of("model.bert.encoder.layer")),
    Model("vit", hf.vit, children_of("model.vit.layers")),
    Model(
        "resnet",
        hf.resnet,
        children_of("model.resnet.encoder.stages.0.layers", "model.resnet.encoder.stages.1.layers"),
    ),
)
LARGE = (
    Model("gpt2-12L", hf.gpt2_12l, children_of("model.transformer.h")),
    Model("llama-16L", hf.llama_16l, children_of("model.model.layers")),
)


def subsets(names: Sequence[str] = tuple(LISTS)) -> Iterator[tuple[str, ...]]:
    """All subsets of the lists, the empty one first."""
    for size in range(len(names) + 1):
        yield from combinations(names, size)


def modelled(problem: EagerProblem, blocks: Sequence[str], ops: Sequence[Any]) -> EagerPlan:
    """What torch does with an op list, as the simulator's plan."""
    names = {f"{op}" for op in ops}
    regions = {i for i, region in enumerate(problem.regions) if region.name in blocks}
    kept = {
        op
        for index in regions
        for op in range(*problem.regions[index].ops)
        if problem.ops[op].makes and any(name in problem.ops[op].name for name in names)
    }
    return EagerPlan(frozenset(regions), frozenset(kept))


def measured(make: Callable[[], Built], blocks: Any, ops: Sequence[Any]) -> tuple[int, int]:
    """Peak bytes and flops of a step with torch's regions around the blocks."""
    step, args = make()
    context_fn = partial(create_selective_checkpoint_contexts, list(ops))
    checkpoint_blocks(step, blocks(step), **({"context_fn": context_fn} if ops else {}))
    found = ckpt_pass.measure_step(
        lambda: step(*args), warmup=0, repeats=1, params=step.parameters()
    )
    return found.peak_bytes, found.flops


def rows_of(model: Model) -> list[EagerRow]:
    """Torch's front, ours at each of its peaks, and the least of both."""
    step, args = model.make()
    blocks = model.blocks(step)
    problem = eager_problem(trace_step(step, args, None), {})
    plain = ckpt_pass.plan(step, *args, budget=1.0, mode="eager")
    torchs = []
    for chosen in subsets():
        ops = [op for name in chosen for op in LISTS[name]]
        try:
            peak_bytes, flops = measured(model.make, model.blocks, ops)
        except RuntimeError:  # torch refuses to save what a relu_ changes (ResNet)
            continue
        again = problem.simulate(modelled(problem, blocks, ops))
        label = "torch, " + "+".join(chosen) if chosen else NOTHING_SAVED
        torchs.append(
            EagerRow(
                model.name,
                label,
                peak_bytes,
                None,
                (flops - plain.step_flops) / plain.step_flops,
                again.recompute_time_s / plain.step_time_s,
            )
        )
    found = []
    least = least_budget(step, args)
    for row in _front(torchs):
        # A plan keeps some bytes free, so that the least that one takes as a budget is a little
        # above the least peak; the bar is on measured peaks.
        budget = max(row.peak_bytes, least)
        found += [row, _ours(model, step, args, budget, "plan for the same")]
    found.append(_ours(model, step, args, least, "plan, least peak"))
    return found


def least_budget(step: nn.Module, args: tuple[Any, ...]) -> int:
    """The least budget that there is a plan for, in bytes."""
    try:
        ckpt_pass.plan(step, *args, budget=1, mode="eager")
    except ckpt_pass.InfeasibleBudgetError as error:
        return error.least_feasible_bytes
    raise AssertionError("a plan for one byte")


def _front(rows: list[EagerRow]) -> list[EagerRow]:
    """Rows that none beats in peak and flops and time, and a plain checkpoint's, by peak."""

    def beaten(row: EagerRow) -> bool:
        if row.way == NOTHING_SAVED:
            return False
        others = (other.costs for other in rows if other.costs != row.costs)
        return any(all(map(operator.le, costs, row.costs)) for costs in others)

    return sorted((row for row in rows if not beaten(row)), key=lambda row: row.peak_bytes)


def _ours(
    model: Model, step: nn.Module, args: tuple[Any, ...], budget_bytes: int, label: str
) -> EagerRow:
    plan = ckpt_pass.plan(step, *args, budget=budget_bytes, mode="eager")
    with plan.applied(step):
        found = ckpt_pass.measure_step(
            lambda: step(*args), warmup=0, repeats=1, params=step.parameters()
        )
    return EagerRow(
        model.name,
        label,
        found.peak_bytes,
        plan.peak_bytes,
        (found.flops - plan.step_flops) / plan.step_flops,
        plan.recompute_time_s / plan.step_time_s,
    )


def run(models: Sequence[Model] = (*SMALL, *LARGE)) -> Result:
    """Measure every model."""
    rows = [row for model in models for row in rows_of(model)]
    return Result(
        "eager-budgets",
        "Eager plans beside torch's selective checkpointing, blocks as regions",
        tuple(rows),
        tuple(_bars(rows)),
    )


def _bars(rows: list[EagerRow]) -> Iterator[Bar]:
    for torchs, ours in pairwise(rows):
        if ours.way != "plan for the same":
            continue
        where = f"{ours.model} at {torchs.way}"
        yield Bar(f"{where}: peak", ours.peak_bytes, torchs.peak_bytes, "bytes")
        yield Bar(f"{where}: recomputed time", ours.time_share, torchs.time_share)
        yield Bar(f"{where}: recomputed flops", ours.flops_share, torchs.flops_share)
    for row in rows:
        if row.way == "plan, least peak":
            blocks = next(r for r in rows if r.model == row.model and r.way == NOTHING_SAVED)
            yield Bar(f"{row.model}: least peak", row.peak_bytes, blocks.peak_bytes, "bytes")
