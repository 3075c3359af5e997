"""Jobs on several gloo processes, started once; what each rank returns or raises."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import ckpt_pass
from ckpt_pass._torch.collector import quiet_collector
from ckpt_pass.measure.allocations import profiled, read_recording

Job = Callable[[int], Any]
LIMIT_S = 60
WIDTH, ROWS = 32, 64


@contextmanager
def simulated(ranks: int) -> Iterator[None]:
    """A process group of so many ranks, of which this process is the first; none exchanges."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Block(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = x + self.down(self.act(self.up(self.norm(x))))
        return hidden


class Blocks(nn.Module):
    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def made(count: int = 3) -> Blocks:
    torch.manual_seed(0)
    return Blocks(count)


def batch(rank: int, step: int = 0, rows: int = ROWS) -> Tensor:
    generator = torch.Generator().manual_seed(17 * step + rank)
    return torch.randn(rows, WIDTH, generator=generator)


def own(tensor: Any) -> Tensor:
    """A rank's part of a tensor."""
    found = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    assert isinstance(found, Tensor)
    return found


Steps = list[tuple[float, list[bytes]]]


def trained(model: nn.Module, rank: int, rows: int = ROWS, steps: int = 3) -> Steps:
    """Losses and gradients of some steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(batch(rank, step, rows))
        loss.backward()
        gradients = [own(p.grad).numpy().tobytes() for p in model.parameters()]
        found.append((own(loss).item(), gradients))
        optimizer.step()
    optimizer.zero_grad()
    return found


@contextmanager
def patient(seconds: float = 0.005) -> Iterator[None]:
    """Inside, FSDP's collectives are followed by a rest, in which gloo's threads let go."""
    kinds = ("all_gather_single", "reduce_scatter_single")
    before = {kind: getattr(dist, kind) for kind in kinds if hasattr(dist, kind)}

    def rested(collective: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            found = collective(*args, **kwargs)
            time.sleep(seconds)
            return found

        return run

    for kind, collective in before.items():
        setattr(dist, kind, rested(collective))
    try:
        yield
    finally:
        for kind, collective in before.items():
            setattr(dist, kind, collective)


def peaks(
    model: nn.Module, step: Callable[[], object], predicted_bytes: int, most: int = 24
) -> int:
    """The least measured peak of a step: gloo's threads let go of their copies late at times.

    It runs again where that was so: as long as any rank is above what it predicts by more than 1 %.
    """
    found: list[int] = []
    above = torch.ones(())
    while above and len(found) < most:
        model.zero_grad()
        span = torch.profiler.record_function("a step")
        with patient(), quiet_collector(), profiled() as session, span:
            step()
        recording = read_recording(session, torch.device("cpu"), lambda name: name == "a step")
        found.append(recording.peaks()["a step"])
        above = torch.tensor(float(min(found) > 1.01 * predicted_bytes))
        dist.all_reduce(above)
    model.zero_grad()
    return min(found)


def tracked_bytes(model: nn.Module, inputs: Tensor) -> int:
    """The peak that FSDPMemTracker finds in a step that is run, above parameters and inputs."""
    tracker = FSDPMemTracker(model)
    tracker.track_inputs((inputs,))
    with tracker:
        model(inputs).backward()
    snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    found = {str(kind): nbytes for kind, nbytes in snapshot.items()}
    before = sum(n for kind, n in found.items() if kind.endswith((".SHARDED_PARAM", ".INP")))
    return found["Total"] - before


def on_ranks(jobs: Sequence[Job], folder: Path, ranks: int = 2) -> dict[str, list[Any]]:
    """Run jobs one after the other, each in a process group of its own."""
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(_on_rank, (ranks, tuple(jobs), str(folder), results), nprocs=ranks)
        return {
            job.__name__: [results[job.__name__, rank] for rank in range(ranks)] for job in jobs
        }


def _on_rank(rank: int, ranks: int, jobs: Sequence[Job], folder: str, results: Any) -> None:
    torch.set_num_threads(1)
    for job in jobs:
        name = job.__name__
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/{name}",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=LIMIT_S),
        )
        began = time.monotonic()
        try:
            results[name, rank] = job(rank)
        except ckpt_pass.CkptPassError as error:
            results[name, rank] = type(error).__name__, str(error), time.monotonic() - began
        finally:
            dist.destroy_process_group()
