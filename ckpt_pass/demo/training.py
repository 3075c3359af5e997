"""The demo: one model trained nine ways, the same loss each time, at different peaks and speeds."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ckpt_pass.demo.model import Llama, ModelConfig
from ckpt_pass.demo.results import ROUNDS, Result, check_losses, plot, result_table
from ckpt_pass.demo.variants import Batch, Variant, variants
from ckpt_pass.drawing.memory import MemoryCurve, missing_extra
from ckpt_pass.measure.step import measure_step

if TYPE_CHECKING:
    from rich.console import Console

#: Modules of Python's standard library whose source is the text: some 700 kB of ASCII.
TEXT_MODULES = ("argparse", "ast", "datetime", "doctest", "inspect", "tarfile", "turtle", "typing")
SEED = 20  # any fixed number
LEARNING_RATE = 1e-3
#: Columns of the table where the output is no terminal, whose width rich could ask for.
PLAIN_WIDTH = 110
#: What is to say of the inner compilers.
INNERS = {
    "aot_eager": "quick, no code is generated (or --inner inductor)",
    "inductor": "C++ is generated, which takes a while (or --inner aot_eager)",
}


@dataclass(frozen=True)
class DemoSettings:
    """What the demo runs.

    ``inner`` is ``aot_eager`` by default: it generates no C++, which takes Inductor up to a minute
    a variant, and so the whole demo takes less than two minutes, and every loss is the same bit by
    bit. ``threads`` is 1 by default: then neither other programs on the machine nor its number of
    cores change the figures much. ``budget`` is little enough that much is recomputed.
    """

    steps: int = 5
    inner: str = "aot_eager"
    threads: int = 1
    model: ModelConfig = field(default_factory=ModelConfig)
    batch: int = 8
    budget: float = 0.25
    out: Path = Path("demo_out")


DEFAULTS = DemoSettings()


def run_demo(settings: DemoSettings = DEFAULTS) -> tuple[Result, ...]:
    """Train every variant from the same weights on the same text, measure, print and plot.

    Returns:
        The results, in the order of :func:`variants`.

    Raises:
        InfeasibleBudgetError: the budget is too small for a model of that size.
        LossDiffersError: a variant computed something else; the table is printed first.
        MissingExtraError: rich or matplotlib is not installed.
    """
    console = _console()
    chosen = variants(settings.inner, settings.budget)
    settings.out.mkdir(parents=True, exist_ok=True)
    for line in describe(settings):
        console.print(line, highlight=False)
    torch.compiler.reset()  # what was compiled before counts towards dynamo's limits
    with torch_threads(settings.threads):
        results = _run_all(chosen, settings, console)
    console.print(result_table(results))
    for path in plot(results, settings.out):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    check_losses(results)
    return tuple(results)


def _run_all(chosen: Sequence[Variant], settings: DemoSettings, console: Console) -> list[Result]:
    batches = make_batches(settings)
    trained = []
    for number, variant in enumerate(chosen, start=1):
        began = time.perf_counter()
        title = f"{number}/{len(chosen)} {variant.title}"
        with _progress(console, title, settings) as tick:
            step, loss = train(variant, settings, batches, tick)
        measured = measure_step(step, warmup=0, repeats=1, params=step.model.parameters())
        # The last run is the profiled one, the run of the timeline.
        curve = MemoryCurve(variant.title, measured.timeline, measured.peak_bytes, step.forward_s)
        trained.append((variant, step, loss, measured, curve))
        console.print(f"{title}: {time.perf_counter() - began:.0f} s", highlight=False)
    times = fastest([step for _, step, *_ in trained])
    return [
        Result(variant, loss, measured, curve, time_s)
        for (variant, _, loss, measured, curve), time_s in zip(trained, times, strict=True)
    ]


def fastest(steps: Sequence[TimedStep]) -> list[float]:
    """Seconds of the fastest run of each step, forward and backward.

    The steps take turns, so that whatever else the machine does meets all of them.
    """
    rounds = [[step.timed() for step in steps] for _ in range(ROUNDS)]
    return [min(times) for times in zip(*rounds, strict=True)]


def describe(settings: DemoSettings) -> Iterator[str]:
    """The machine, the model and how it is trained, in words."""
    model = settings.model
    threads = f"{settings.threads} thread" + ("s" if settings.threads > 1 else "")
    yield f"{_cpu_name()}, {_cores()} cores, {threads}; torch {torch.__version__}"
    yield (
        f"Llama-like transformer: {model.layers} layers, width {model.dim}, {model.heads} heads; "
        f"{settings.batch} sequences of {model.length} characters, float32"
    )
    inner = f"{settings.inner}: {INNERS[settings.inner]}"
    yield f"{settings.steps} steps of AdamW each; compiled with {inner}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")  # Linux; platform.processor() is empty or only x86_64 there
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def make_batches(settings: DemoSettings) -> list[Batch]:
    """One (tokens, targets) a step, int64, batch x length: places drawn from the text."""
    text = "".join(inspect.getsource(importlib.import_module(name)) for name in TEXT_MODULES)
    codes = torch.frombuffer(bytearray(text.encode("ascii", "replace")), dtype=torch.uint8).long()
    length = settings.model.length
    random = torch.Generator().manual_seed(SEED)
    batches = []
    for _ in range(settings.steps):
        starts = torch.randint(len(codes) - length, (settings.batch,), generator=random)
        windows = torch.stack([codes[start : start + length + 1] for start in starts.tolist()])
        batches.append((windows[:, :-1].contiguous(), windows[:, 1:].contiguous()))
    return batches


class TimedStep:
    """Forward to the loss on one batch; remembers how long the last forward took."""

    def __init__(self, run: Callable[..., Tensor], batch: Batch, model: nn.Module) -> None:
        self.run = run
        self.batch = batch
        self.model = model
        self.forward_s = 0.0

    def __call__(self) -> Tensor:
        began = time.perf_counter()
        loss = self.run(*self.batch)
        self.forward_s = time.perf_counter() - began
        return loss

    def timed(self) -> float:
        """Run forward and backward; return the seconds, and leave no gradients behind."""
        began = time.perf_counter()
        self().backward()
        seconds = time.perf_counter() - began
        self.model.zero_grad()
        return seconds


def train(
    variant: Variant, settings: DemoSettings, batches: list[Batch], tick: Callable[[], None]
) -> tuple[TimedStep, float]:
    """Train from the same weights; return a step to measure, and the loss of the last step."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = Llama(settings.model, variant.run_block)
    run = variant.prepare(model, batches[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    loss = torch.zeros(())
    for tokens, targets in batches:
        loss = run(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tick()
    return TimedStep(run, batches[-1], model), loss.item()


def _console() -> Console:
    with missing_extra("cli"):
        from rich.console import Console
    console = Console()
    return console if console.is_terminal else Console(width=PLAIN_WIDTH)


@contextlib.contextmanager
def _progress(console: Console, title: str, settings: DemoSettings) -> Iterator[Callable[[], None]]:
    """A progress bar over the training steps; it leaves nothing behind."""
    from rich.progress import Progress

    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=settings.steps)
        yield partial(progress.advance, task)


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch's kernels use ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
