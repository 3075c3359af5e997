"""What a GPU's user wants to know first: less activation memory, for how much time.

The Llama of ``benchmarks/gpu_offload.py`` (0.94 billion parameters, bf16, 4 x 4,096 tokens) takes a
step with nothing recomputed, with a checkpoint on every block, with torch's selective checkpoint
(products and attention saved), and at torch's own budgets; ours with half and with a quarter of the
activation memory, and at the peaks of torch's ways: around Inductor, and with ``aot_eager``. The
activation memory is what the step with nothing recomputed holds between forward and backward. What
there is no time for is left out, and named.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from benchmarks.common import MATMUL_ATTENTION_OPS, Bar, GpuRow, Result
from benchmarks.gpu import CLOSE, Size, Ways, say, the_device
from benchmarks.gpu_offload import LARGE, added
from ckpt_pass._torch.compilers import stock_backend

ROUNDS = 7
#: Seconds for all ways together, of the nine minutes that a run may take.
LIMIT_S = 400.0
#: Settings of torch's own budget.
TORCH_BUDGETS = (0.5, 0.3)
#: For a dry run on the CPU: what is saved is most of the peak here, too.
SMALL = Size(2, 32, 64, 2, 64, 64, batch=16, dtype=torch.float32)
#: Parts of the activation memory that are to be done without, and the time that this may cost.
LESS = ((2, 1.02), (4, 1.10))
PLAIN, BLOCKS, SELECTIVE = "nothing recomputed", "checkpoint on each block", "torch's selective"


@dataclass
class Clock:
    """Says whether there is time for one more way.

    Attributes:
        limit_s: for all ways.
        began_s: when the first one began.
        longest_s: of the ways so far.
        left_out: what there was no time for, or what failed, in words.
    """

    limit_s: float
    began_s: float = field(default_factory=time.perf_counter)
    longest_s: float = 0.0
    left_out: list[str] = field(default_factory=list)

    def run(self, way: str, step: Callable[[], Any]) -> None:
        """Take a way if there is time for the longest so far; one that fails is left out."""
        began = time.perf_counter()
        if began - self.began_s + self.longest_s > self.limit_s:
            self._leave(f"{way}: no time")
            return
        try:
            step()
        except RuntimeError as error:  # torch's own, dynamo's and out of memory are such
            lines = str(error).strip().splitlines()
            self._leave(f"{way}: {type(error).__name__}: {lines[0] if lines else ''}")
        self.longest_s = max(self.longest_s, time.perf_counter() - began)

    def _leave(self, words: str) -> None:
        say(f"left out: {words}")
        self.left_out.append(words)


def run(
    size: Size | None = None,
    device: str | None = None,
    rounds: int = ROUNDS,
    inners: Sequence[str] = ("inductor", "aot_eager"),
    limit_s: float = LIMIT_S,
    brief: bool = False,
) -> Result:
    """Measure every way that there is time for; on the CPU a tiny model unless a size is given.

    Args:
        size, device, rounds: of the model, and of the timings.
        inners: what compiles the ways; torch's own ones are compared around the first alone.
        limit_s: seconds for all ways.
        brief: one way of each kind, with nothing that another one does as well.
    """
    place = the_device(device)
    ways = Ways(size or (LARGE if place.type == "cuda" else SMALL), place, rounds)
    clock = Clock(limit_s)
    with torch._dynamo.config.patch(recompile_limit=64):
        for inner in inners:
            _plain_and_less(ways, clock, inner, brief)
        _others(ways, clock, inners[0], () if brief else TORCH_BUDGETS)
    found = ways.result("gpu-headline", _bars(ways, inners))
    facts = {**found.facts, "left_out": clock.left_out, "saved_bytes": ways.saved_bytes}
    return Result(found.name, found.title, found.rows, found.bars, facts)


def _named(inner: str, way: str) -> str:
    return f"{inner}: {way}"


def _plain_and_less(ways: Ways, clock: Clock, inner: str, brief: bool) -> None:
    """The plain step, full checkpointing, and ours with parts of the activation memory."""
    plain, blocks = _named(inner, PLAIN), _named(inner, BLOCKS)
    clock.run(plain, lambda: ways.add(plain, stock_backend(inner, 1.0), beside=plain))
    if plain not in ways.saved_bytes:
        return
    for divisor, _ in LESS[:1] if brief else LESS:
        way, budget = _less(inner, divisor), _budget(ways, inner, divisor)
        clock.run(way, partial(added, ways, way, budget, beside=plain, inner=inner))
    if not brief:
        clock.run(blocks, lambda: ways.add(blocks, inner, ways.checkpointed(), beside=plain))


def _less(inner: str, divisor: int) -> str:
    return _named(inner, f"ours, 1/{divisor} of the activations")


def _budget(ways: Ways, inner: str, divisor: int) -> int:
    """The plain peak less all but a part of what the plain step saves."""
    plain = _named(inner, PLAIN)
    peak = next(row.measured_bytes for row in ways.rows if row.way == plain)
    saved = ways.saved_bytes[plain]
    return peak - (saved - saved // divisor)


def _others(ways: Ways, clock: Clock, inner: str, torch_budgets: Sequence[float]) -> None:
    """Torch's selective checkpoint and budgets, and ours at the peak of each."""
    plain = _named(inner, PLAIN)
    contexts = partial(create_selective_checkpoint_contexts, list(MATMUL_ATTENTION_OPS))
    ways_of_torch: list[tuple[str, Callable[[str], None]]] = [
        (SELECTIVE, lambda way: ways.add(way, inner, ways.checkpointed(contexts), beside=plain)),
        *(
            (f"torch's budget {setting:g}", partial(_stock, ways, inner, setting, plain))
            for setting in torch_budgets
        ),
    ]
    for name, take in ways_of_torch:
        way = _named(inner, name)
        clock.run(way, partial(take, way))
        for row in ways.rows:
            if row.way == way:
                ours = _named(inner, f"ours, peak of {name}")
                peak = row.measured_bytes
                clock.run(ours, partial(added, ways, ours, peak, beside=way, inner=inner))


def _stock(ways: Ways, inner: str, setting: float, beside: str, way: str) -> None:
    ways.add(way, stock_backend(inner, setting), beside=beside)


def _bars(ways: Ways, inners: Sequence[str]) -> tuple[Bar, ...]:
    rows = {row.way: row for row in ways.rows}
    bars: list[Bar] = []
    for inner in inners:
        for divisor, ratio in LESS:
            with suppress(KeyError):  # there was no time for it
                bars += _bars_of(rows[_less(inner, divisor)], _budget(ways, inner, divisor), ratio)
    ours = [row for row in ways.rows if row.budget_bytes is not None]
    if ours:
        off = max(abs(row.measured_bytes / row.predicted_bytes - 1) for row in ours)
        bars.append(Bar("prediction away from the measured peak, worst", off, 0.01))
    for row in ours:
        if "peak of" in row.way:
            bars.append(Bar(f"step time, {row.way} / {row.beside}", row.time_ratio, 1.0))
    if ways.rows:
        worst = max(row.gradient_off for row in ways.rows)
        bars.append(Bar("gradients away from the plain step's, worst", worst, CLOSE))
    return tuple(bars)


def _bars_of(row: GpuRow, budget: int, ratio: float) -> list[Bar]:
    return [
        Bar(f"peak, {row.way}", row.measured_bytes, budget, "bytes"),
        Bar(f"step time, {row.way} / {PLAIN}", row.time_ratio, ratio),
    ]
