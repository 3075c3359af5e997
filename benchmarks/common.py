"""What every benchmark shares: timing in rounds, rows, bars, and torch's lists of ops."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

_aten = torch.ops.aten

#: What ``save-matmul`` saves, for torch's ``create_selective_checkpoint_contexts``.
MATMUL_OPS: tuple[Any, ...] = (
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten.convolution.default,
)
#: What ``save-matmul-attention`` saves: these and the fused attentions of every device.
MATMUL_ATTENTION_OPS: tuple[Any, ...] = (
    *MATMUL_OPS,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_fused_attention_overrideable.default,
)


@dataclass(frozen=True)
class Variant:
    """One thing to be timed.

    Attributes:
        name: shown in the table.
        run: the timed part; gets what ``prepare`` returned.
        prepare: runs before each timing, untimed.
    """

    name: str
    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class TimingRow:
    """The times of one variant over all rounds: median and quartiles, and the least.

    Times are CPU seconds of this process. On one thread, on a machine that does nothing else,
    they are the wall's; on a busy machine they leave out what the neighbours took. ``ratios``
    are medians over the rounds of this variant's time by that of another one in the same round:
    noise that lasts longer than a round cancels.
    """

    variant: str
    rounds: int
    median_s: float
    lower_quartile_s: float
    upper_quartile_s: float
    least_s: float
    ratios: Mapping[str, float]


@dataclass(frozen=True)
class PeakRow:
    """The exact bytes and flops of one variant of one model's step (``measure_step``)."""

    model: str
    variant: str
    peak_bytes: int
    saved_bytes: int
    flops: int


@dataclass(frozen=True)
class BudgetRow:
    """One point: torch's peak and flops, and ours with that peak as the budget."""

    model: str
    torch_budget: float
    torch_peak_bytes: int
    torch_flops: int
    ours_peak_bytes: int
    ours_flops: int
    plain_flops: int

    @property
    def ratio(self) -> float:
        """Recomputed flops, ours by torch's; 0 where ours recomputes none."""
        theirs, ours = self.torch_flops - self.plain_flops, self.ours_flops - self.plain_flops
        if ours == 0:
            return 0.0
        return ours / theirs if theirs else float("inf")


Row: TypeAlias = TimingRow | PeakRow | BudgetRow


@dataclass(frozen=True)
class Bar:
    """Something that must hold: ``value <= limit``."""

    what: str
    value: float
    limit: float
    unit: str = ""

    @property
    def met(self) -> bool:
        return self.value <= self.limit


@dataclass(frozen=True)
class Result:
    """What one benchmark found."""

    name: str
    title: str
    rows: tuple[Row, ...]
    bars: tuple[Bar, ...]
    facts: Mapping[str, object] = field(default_factory=dict)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch's kernels use ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def resting_collector() -> Iterator[None]:
    """Keep the collector of cyclic garbage from running at a moment of its own choice.

    What is there already is frozen, so that collecting between timings costs little.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def interleave(
    variants: Sequence[Variant], *, rounds: int, warmup: int, references: Sequence[str] = ()
) -> tuple[TimingRow, ...]:
    """Time the variants in rounds: each round runs every one once, in an order that rotates.

    Args:
        variants: what to time.
        rounds: how many timings of each.
        warmup: untimed rounds before.
        references: names of the variants that the others are compared with (``ratios``).
    """
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    with resting_collector():
        for number in range(-warmup, rounds):
            start = number % len(variants)
            for variant in (*variants[start:], *variants[:start]):
                elapsed = _timed(variant)
                if number >= 0:
                    seconds[variant.name].append(elapsed)
    return tuple(_row(variant.name, seconds, references) for variant in variants)


def _timed(variant: Variant) -> float:
    prepared = variant.prepare()
    gc.collect()
    start = time.process_time()
    result = variant.run(prepared)
    elapsed = time.process_time() - start
    del result, prepared  # not within the time
    return elapsed


def _row(name: str, seconds: Mapping[str, list[float]], references: Sequence[str]) -> TimingRow:
    own = seconds[name]
    lower, middle, upper = statistics.quantiles(own, n=4) if len(own) > 1 else own * 3
    ratios = {
        other: statistics.median(a / b for a, b in zip(own, seconds[other], strict=True))
        for other in references
    }
    return TimingRow(name, len(own), middle, lower, upper, min(own), ratios)
