"""What ``tune`` chooses, beside everything that it could have chosen: a sweep over all candidates.

One thread. Each model has a total that its larger microbatches fit by recomputing only; both ways,
compiled and eager, are candidates.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from benchmarks.common import Bar, Result, TuningRow, torch_threads
from ckpt_pass import Job, Tuned, plan, tune
from ckpt_pass.tools.candidates import Batches, Planned, Way
from ckpt_pass.tools.timed_steps import Stopwatch
from tests.zoo import seeded
from tests.zoo.hf import (
    LABELS,
    SPECIAL_TOKENS,
    VOCAB,
    TrainStep,
    images,
    label_loss,
    next_token_loss,
    text_ids,
)

#: Timings of each candidate in the sweep: 5 alone, and 20 in turn, which count. ``tune`` times none
#: more often, so that its share of the candidates is the most that its share of the timings can be.
ROUNDS, BLOCKS = 5, 4
WAYS = ("compiled", "eager")
#: A choice is as good as the sweep's best within this, and fewer candidates were measured.
NEAR, SHARE = 1.05, 1 / 3


@dataclass(frozen=True)
class Subject:
    """A model to tune.

    Attributes:
        make: builds it.
        batch: its arguments for so many samples.
        global_batch: samples of an optimizer's step.
        roomy: the microbatch that fits with nothing recomputed, in eager mode, to the byte.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[int], tuple[torch.Tensor, ...]]
    global_batch: int
    roomy: int


def _options(**options: Any) -> dict[str, Any]:
    return options


def _gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=128, n_embd=128, n_layer=4, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        use_cache=False, **SPECIAL_TOKENS, **_options(attn_implementation="sdpa"),
    )  # fmt: skip
    return TrainStep(GPT2LMHeadModel(config), next_token_loss)


def _resnet() -> nn.Module:
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64], depths=[2, 2, 2], layer_type="basic",
        **_options(num_labels=LABELS),
    )  # fmt: skip
    return TrainStep(ResNetForImageClassification(config), label_loss)


def _vit() -> nn.Module:
    config = ViTConfig(
        hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=384,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, image_size=32, patch_size=4,
        **_options(num_labels=LABELS, attn_implementation="sdpa"),
    )  # fmt: skip
    return TrainStep(ViTForImageClassification(config), label_loss)


def _labelled(size: int) -> Callable[[int], tuple[torch.Tensor, ...]]:
    return lambda count: (images(count, size), torch.arange(count) % LABELS)


SUBJECTS: Mapping[str, Subject] = {
    "gpt2-4L": Subject(_gpt2, lambda count: (text_ids(count, 128),), 24, roomy=6),
    "resnet": Subject(_resnet, _labelled(64), 48, roomy=12),
    "vit-4L": Subject(_vit, _labelled(32), 48, roomy=12),
}


def run(subjects: Mapping[str, Subject] = SUBJECTS, rounds: int = ROUNDS) -> Result:
    """Tune each model, and measure all that fits.

    Args:
        subjects: the models by name.
        rounds: timings of each candidate in the sweep, five times.
    """
    rows: list[TuningRow] = []
    bars: list[Bar] = []
    with torch_threads(1):
        for name, subject in subjects.items():
            print(f"{name}: tuning, and a sweep", file=sys.stderr)
            of_model = _rows(name, subject, rounds)
            rows += of_model
            bars += bars_of(name, of_model)
    title = "tune beside a sweep over all candidates: samples per second, AdamW"
    return Result("tuning", title, tuple(rows), tuple(bars))


def bars_of(name: str, rows: Sequence[TuningRow]) -> tuple[Bar, Bar]:
    """How near the choice is to the best, and what share of the candidates was measured."""
    best = max(row.swept_per_s for row in rows)
    chosen = next(row for row in rows if row.chosen)
    measured = sum(row.measured_per_s is not None for row in rows)
    return (
        Bar(f"{name}, the sweep's best by the choice", best / chosen.swept_per_s, NEAR),
        Bar(f"{name}, measured by the sweep's measurements", measured / len(rows), SHARE),
    )


def _rows(name: str, subject: Subject, rounds: int) -> list[TuningRow]:
    model, _ = seeded(lambda: (subject.make(), ()))()
    optimizer = torch.optim.AdamW(model.parameters())
    job = Job(optimizer, accumulate=subject.global_batch // subject.roomy)
    roomy = plan(model, *subject.batch(subject.roomy), total="1 TB", optimizer=job, mode="eager")
    assert roomy.account is not None
    found = tune(
        model,
        subject.batch,
        total=roomy.account.peak_bytes,
        optimizer=optimizer,
        global_batch=subject.global_batch,
        mode=WAYS,
    )
    swept = _sweep(model, subject, found, rounds)
    return [
        TuningRow(
            model=name,
            way=row.way,
            microbatch=row.microbatch,
            accumulate=row.accumulate,
            peak_bytes=row.peak_bytes or 0,
            total_bytes=found.total_bytes,
            recompute_share=row.recompute_share or 0.0,
            predicted_per_s=row.predicted_per_s or 0.0,
            measured_per_s=row.measured_per_s,
            swept_per_s=subject.global_batch / swept[number],
            chosen=number == found.chosen,
        )
        for number, row in enumerate(found.rows)
        if number in swept
    ]


def _sweep(model: nn.Module, subject: Subject, found: Tuned, rounds: int) -> dict[int, float]:
    """Seconds of a global batch, of each row that fits: medians, all in turn."""
    stopwatch = Stopwatch(model, None, Batches(model, subject.batch, tune), rounds)
    planned = {
        number: Planned(Way(row.way, "aot_eager"), row.microbatch, row.accumulate, row.plan)
        for number, row in enumerate(found.rows)
        if row.plan is not None
    }
    with stopwatch.opened():
        for one in planned.values():
            stopwatch.pass_s(one)
        stopwatch.forget(planned.values())
        for _ in range(BLOCKS):
            times = stopwatch.in_turn(planned.values())
    return {n: one.accumulate * times[one] + found.update_s for n, one in planned.items()}
