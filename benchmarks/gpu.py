"""Budgets on a GPU, beside stock Inductor and per-block checkpoint: peaks and step times.

A Llama of about a billion parameters in bf16 takes one step in each way: stock Inductor at several
settings of its ``activation_memory_budget``, checkpoint on every block, compiled, and ours with
each of their peaks as the budget, and with the least that we know. Peaks are those of the caching
allocator (``torch.cuda.max_memory_allocated``), above what was allocated when the step began;
times are medians of interleaved rounds. Without a GPU a tiny model takes the same way on the CPU.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import ckpt_pass
from benchmarks.common import Bar, GpuRow, Result
from benchmarks.inductor import least_bytes
from ckpt_pass import Plan
from ckpt_pass._torch.compilers import stock_backend
from tests.zoo import checkpoint_blocks, loss_of
from tests.zoo.hf import TrainStep, next_token_loss

Around = Callable[[], AbstractContextManager[object]]
#: Settings of torch's own budget.
STOCK = (1.0, 0.3)
#: Budgets of our own, from the least that we know (0) to stock's peak at a setting of 1.
PARTS = (0.0,)
ROUNDS = 9
#: bf16 kernels round otherwise in another order, and the backward of flash attention adds in no
#: fixed one: two runs of stock Inductor's step differ by some hundredths of the largest gradient.
CLOSE = 0.1


@dataclass(frozen=True)
class Size:
    """Of a Llama; by default four layers as wide as those of Llama 7B: 1.07 billion parameters.

    Few wide layers compile in seconds each, so that all ways are compared in minutes.
    """

    layers: int = 4
    width: int = 4096
    inner: int = 11008
    heads: int = 32
    vocabulary: int = 32000
    tokens: int = 4096
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16


#: For a machine without a GPU.
TINY = Size(2, 64, 128, 4, 128, 64, dtype=torch.float32)


def run(
    size: Size | None = None,
    device: str | None = None,
    stock: Sequence[float] = STOCK,
    parts: Sequence[float] = PARTS,
    rounds: int = ROUNDS,
) -> Result:
    """Measure every way; on the CPU a tiny model unless a size is given."""
    place = the_device(device)
    ways = Ways(size or (Size() if place.type == "cuda" else TINY), place, rounds)
    with torch._dynamo.config.patch(recompile_limit=64):
        ways.stock(stock)
        ways.ours(parts)
    return ways.result("gpu", _bars(ways.rows))


def the_device(name: str | None = None) -> torch.device:
    """The one that is named, else the GPU, where there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _bars(rows: Sequence[GpuRow]) -> tuple[Bar, ...]:
    ours = [row for row in rows if row.budget_bytes is not None]
    met = max(row.measured_bytes - (row.budget_bytes or 0) for row in ours)
    off = max(abs(row.measured_bytes / row.predicted_bytes - 1) for row in ours)
    ratios = [row.time_ratio for row in ours if row.beside]
    return (
        Bar("measured peak over the budget, worst", met, 0, "bytes"),
        Bar("prediction away from what is measured, worst", off, 0.005),
        Bar("step time at stock's peak, ours / stock, median", statistics.median(ratios), 0.95),
        Bar("step time at stock's peak, ours / stock, worst", max(ratios), 1.02),
        Bar("gradients away from stock's, worst", max(r.gradient_off for r in rows), CLOSE),
    )


def built(size: Size, device: torch.device) -> tuple[nn.Module, Tensor]:
    """The model and its tokens, the same at each call."""
    config = LlamaConfig(
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=size.tokens,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM(config).to(size.dtype).train()
    tokens = torch.randint(size.vocabulary, (size.batch, size.tokens), device=device)
    return TrainStep(model, next_token_loss), tokens


class Ways:
    """The ways through one step; each is compiled and measured as it is added."""

    def __init__(self, size: Size, device: torch.device, rounds: int) -> None:
        self.model, self.tokens = built(size, device)
        self.rows: list[GpuRow] = []
        #: What each way saves between forward and backward.
        self.saved_bytes: dict[str, int] = {}
        self._size, self._device, self._rounds = size, device, rounds
        self._steps: dict[str, Callable[[], Any]] = {}
        self._gradients: list[Tensor] = []

    def result(self, name: str, bars: tuple[Bar, ...]) -> Result:
        """What was measured, with a title that says on what."""
        count = sum(p.numel() for p in self.model.parameters())
        cuda = self._device.type == "cuda"
        where = torch.cuda.get_device_name(self._device) if cuda else "CPU"
        size, dtype = self._size, str(self._size.dtype).removeprefix("torch.")
        title = f"{name}: Llama, {count / 1e9:.2f} billion parameters, {dtype}, "
        title += f"{size.batch} x {size.tokens} tokens, on {where}"
        return Result(name, title, tuple(self.rows), bars, {"device": where})

    def stock(self, settings: Sequence[float]) -> None:
        """Stock Inductor at settings of its own budget, and with a checkpoint on every block."""
        for setting in settings:
            self.add(f"stock, {setting:g}", stock_backend("inductor", setting))
        self.add("checkpoint on each block", "inductor", self.checkpointed())

    def checkpointed(self, context_fn: Callable[[], Any] | None = None) -> nn.Module:
        """A copy of the model with a checkpoint on every block, perhaps a selective one."""
        blocks = copy.deepcopy(self.model)
        names = [f"model.model.layers.{n}" for n in range(len(blocks.model.model.layers))]
        checkpoint_blocks(blocks, names, context_fn)
        return blocks

    def ours(self, parts: Sequence[float]) -> None:
        """Ours at the peak of each way so far, and at parts of the way from the least to it."""
        others = list(self.rows)
        least = least_bytes(self.model, (self.tokens,))
        say(f"the least that we know: {least:,} bytes")
        for other in others:
            if other.measured_bytes >= least:
                self.add_ours(f"ours, peak of: {other.way}", other.measured_bytes, other.way)
        for part in parts:
            budget = least + int(part * (others[0].measured_bytes - least))
            self.add_ours(f"ours, {part:g}", budget)

    def add_ours(self, way: str, budget: int, beside: str = "", **options: Any) -> Plan:
        """One of ours, timed beside another way (the first, where none is named)."""
        backend = ckpt_pass.make_backend(budget=budget, **options)
        row = self._measured(way, self.model, backend)
        plan = backend.plans[-1]
        row = replace(row, budget_bytes=budget, predicted_bytes=plan.peak_bytes, beside=beside)
        self._timed(row)
        return plan

    def add(
        self,
        way: str,
        backend: Any,
        model: nn.Module | None = None,
        around: Around = nullcontext,
        beside: str = "",
    ) -> None:
        """Another's way; ``around`` is entered for every step.

        It is timed beside another way, the first where none is named.
        """
        row = self._measured(way, model or self.model, backend, around)
        self._timed(replace(row, beside=beside))

    def _measured(
        self, way: str, model: nn.Module, backend: Any, around: Around = nullcontext
    ) -> GpuRow:
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        parameters = list(model.parameters())

        def step() -> Tensor:
            for parameter in parameters:
                parameter.grad = None
            with around():
                return loss_of(compiled(self.tokens))

        with torch._inductor.utils.fresh_cache():
            began = time.perf_counter()
            step().backward()
            self._wait()
            first_s = time.perf_counter() - began
            off = self._off([p.grad for p in parameters if p.grad is not None])
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            measured = ckpt_pass.measure_step(
                step, device=self._device, warmup=1, repeats=1, params=parameters
            )
        self._steps[way] = lambda: step().backward()
        self.saved_bytes[way] = measured.saved_bytes or 0
        peak = measured.peak_bytes
        return GpuRow(way, None, peak, peak, first_s, 0.0, 1.0, off)

    def _timed(self, row: GpuRow) -> None:
        """Add a row with its times, measured in turn with the way that it stands beside."""
        mine, theirs = self._steps[row.way], self._steps[row.beside or next(iter(self._steps))]
        pairs = [(self._seconds(mine), self._seconds(theirs)) for _ in range(self._rounds)]
        step_s = statistics.median(pair[0] for pair in pairs)
        ratio = statistics.median(pair[0] / pair[1] for pair in pairs)
        self.rows.append(replace(row, step_s=step_s, time_ratio=ratio))
        say(f"{self.rows[-1]}")  # each takes up to a minute: not to be lost if the rest fails

    def _off(self, gradients: list[Tensor]) -> float:
        """How far the gradients are from the first way's, as a share of each one's largest."""
        if not self._gradients:
            self._gradients = [gradient.clone() for gradient in gradients]
        pairs = zip(gradients, self._gradients, strict=True)
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)

    def _seconds(self, step: Callable[[], Any]) -> float:
        self._wait()
        began = time.perf_counter()
        step()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def say(text: str) -> None:
    """A line on standard error, at once."""
    print(text, file=sys.stderr, flush=True)
