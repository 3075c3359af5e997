"""Every known way to checkpoint, beside each other on real steps, and the claims people quote.

Eager, one thread. The GPT-2 is that of the project's other figures; a second one computes its
attention op by op, as the models of the claims did; the ResNet is of the size of ResNet-18.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, ResNetConfig, ResNetForImageClassification

from benchmarks.common import Bar, ClaimRow, Result, StrategyOf, torch_threads
from ckpt_pass import Comparison, Strategy, StrategyRow, compare_strategies
from ckpt_pass.report.strategy_rows import recompute_share
from ckpt_pass.report.sweeps import front
from tests.zoo import Built, seeded
from tests.zoo.hf import (
    LABELS,
    SPECIAL_TOKENS,
    TrainStep,
    gpt2_12l,
    images,
    label_loss,
    next_token_loss,
    text_ids,
)

ROUNDS = 7
DEFAULT = "all:save-matmul-attention"
STRATEGIES = (
    "none", "all", "alternate", "every-3", "heavy-ops", "sqrt-segments", "megatron-selective",
    "megatron-full", DEFAULT,
)  # fmt: skip


def gpt2_12l_op_by_op() -> Built:
    """``gpt2_12l`` with attention scores in memory, twice the length, half the batch."""
    config = GPT2Config(
        vocab_size=1000, n_positions=512, n_embd=256, n_layer=12, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        use_cache=False, **SPECIAL_TOKENS, **_options(attn_implementation="eager"),
    )  # fmt: skip
    return _trained(lambda: TrainStep(GPT2LMHeadModel(config), next_token_loss), text_ids(2, 512))


def resnet18() -> Built:
    """A ResNet of 8 basic blocks in 4 stages, as wide as ResNet-18, on images of 64 x 64."""
    config = ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2],
        layer_type="basic", **_options(num_labels=LABELS),
    )  # fmt: skip
    inputs = images(16, 64), torch.arange(16) % LABELS
    return _trained(lambda: TrainStep(ResNetForImageClassification(config), label_loss), *inputs)


def _options(**options: Any) -> dict[str, Any]:
    return options  # what every configuration takes, but none names in its signature


def _trained(make: Callable[[], TrainStep], *inputs: torch.Tensor) -> Built:
    return seeded(lambda: (make(), inputs))()


MODELS: Mapping[str, Callable[[], Built]] = {
    "gpt2-12L": gpt2_12l,
    "gpt2-12L op by op": gpt2_12l_op_by_op,
    "resnet-18": resnet18,
}

#: Of a budget above the peak with every layer a region.
ABOVE_LEAST = 0.01

#: The claim, and the strategy that it is about.
CLAIMS: tuple[tuple[str, str], ...] = (
    ("every second layer: half of the memory", "alternate"),
    ("sqrt(n) segments: from n to sqrt(n) layers", "sqrt-segments"),
    ("full: 75 to 90 % less for a third more time", "all"),
    ("Megatron selective: 30 to 40 % less at 10 to 15 %", "megatron-selective"),
    ("pointwise ops only: half of the memory at 5 %", DEFAULT),
)


def compared(name: str, rounds: int = ROUNDS) -> Comparison:
    """All strategies on one model, and plans whose budgets are peaks of others."""
    model, inputs = MODELS[name]()
    progress = partial(_said, name)
    with torch_threads(1):
        first = compare_strategies(
            model, *inputs, strategies=[DEFAULT, "all"], rounds=1, predict=False, progress=progress
        )
        # A plan keeps some bytes free, so that the least peak itself is no budget that it can meet.
        peaks = [_peak(first.of(DEFAULT)), int(_peak(first.of("all")) * (1 + ABOVE_LEAST))]
        plans = [Strategy(f"budget={peak}B", budget=peak) for peak in dict.fromkeys(peaks)]
        plans.insert(0, Strategy("budget=0.5", budget=0.5))
        return compare_strategies(
            model, *inputs, strategies=[*STRATEGIES, *plans], rounds=rounds, progress=progress
        )


def _said(name: str, what: str, done: int, total: int) -> None:
    print(f"{name}: {done} of {total}, {what}", file=sys.stderr)


def _peak(row: StrategyRow) -> int:
    assert row.peak_bytes is not None
    return row.peak_bytes


def run(rounds: int = ROUNDS, models: tuple[str, ...] = tuple(MODELS)) -> Iterator[Result]:
    """The table of each model, and that of the claims."""
    found: dict[str, Comparison] = {}
    for name in models:
        one = found[name] = compared(name, rounds)
        rows = tuple(StrategyOf(name, row) for row in one.rows)
        title = f"{name}: {one.title}; medians of {one.rounds}"
        yield Result(f"strategies-{name.replace(' ', '-')}", title, rows, _bars(one))
    claims = tuple(
        _claim(claim, name, one, strategy)
        for claim, strategy in CLAIMS
        for name, one in found.items()
        if one.of(strategy).peak_bytes is not None
    )
    yield Result("claims", "What is claimed, and what was measured", claims, ())


def _claim(claim: str, model: str, found: Comparison, strategy: str) -> ClaimRow:
    row, plain = found.of(strategy), found.plain
    assert row.saved_bytes is not None and plain.saved_bytes
    return ClaimRow(
        claim=claim,
        model=model,
        strategy=strategy,
        saving=row.saving or 0.0,
        saved_share=1 - row.saved_bytes / plain.saved_bytes,
        recompute_share=row.recompute_share or 0.0,
        overhead=row.overhead or 0.0,
    )


def _bars(found: Comparison) -> tuple[Bar, ...]:
    """Every step is the plain one, and plans with another's peak for a budget are on the front."""
    wrong = sum(not row.equal for row in found.rows if not row.failure)
    plans = [row for row in found.rows if row.name.startswith("budget=")]
    others = [row for row in found.rows if row not in plans]
    # Two plans for other budgets are not each other's rivals.
    behind = [
        plan.name
        for plan in plans
        if plan.name.endswith("B") and plan not in front([*others, plan], recompute_share)
    ]
    return (
        Bar("steps with another loss or gradient", wrong, 0),
        Bar(f"plans for others' peaks that are not on the front {behind}", len(behind), 0),
    )
