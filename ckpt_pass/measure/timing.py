"""Times of several things that are to be compared: measured in rounds, so that all meet the same.

Whatever else the machine does for longer than a round, every variant meets it.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ckpt_pass._torch.collector import quiet_collector


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

    By default times are CPU seconds of this process. On one thread, on a machine that does nothing
    else, they are the wall's; on a busy machine they leave out what the neighbours took. ``ratios``
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


def clock_for(device: torch.device) -> Callable[[], float]:
    """CPU time where one thread does everything, for it leaves out what the neighbours took."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


@contextmanager
def resting_collector() -> Iterator[None]:
    """Keep the collector of cyclic garbage from running at a moment of its own choice.

    What is there already is frozen, so that collecting between timings costs little.
    """
    with quiet_collector():
        gc.freeze()
        try:
            yield
        finally:
            gc.unfreeze()


def interleave(
    variants: Sequence[Variant],
    *,
    rounds: int,
    warmup: int,
    references: Sequence[str] = (),
    clock: Callable[[], float] = time.process_time,
    on_round: Callable[[], None] = lambda: None,
) -> tuple[TimingRow, ...]:
    """Time the variants in rounds: each round runs every one once, in an order that rotates.

    Args:
        variants: what to time.
        rounds: how many timings of each.
        warmup: untimed rounds before.
        references: names of the variants that the others are compared with (``ratios``).
        clock: seconds; ``time.perf_counter`` where an accelerator or several threads compute.
        on_round: called after each round, warm-up included.
    """
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    with resting_collector():
        for number in range(-warmup, rounds):
            start = number % len(variants)
            for variant in (*variants[start:], *variants[:start]):
                elapsed = _timed(variant, clock)
                if number >= 0:
                    seconds[variant.name].append(elapsed)
            on_round()
    return tuple(_row(variant.name, seconds, references) for variant in variants)


def _timed(variant: Variant, clock: Callable[[], float]) -> float:
    prepared = variant.prepare()
    gc.collect()
    start = clock()
    result = variant.run(prepared)
    elapsed = clock() - start
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
