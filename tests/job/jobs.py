"""Training jobs as a user writes them, and their peak by the profiler's allocation events."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from ckpt_pass._torch.collector import quiet_collector
from ckpt_pass.job.jobs import Job
from ckpt_pass.measure.allocations import profiled, read_recording

CPU = torch.device("cpu")
_SPAN = "tests::job"


class Blocks(nn.Module):
    """Residual blocks with a loss; the last layer is used by nobody, the first is frozen."""

    def __init__(self, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(width, width).requires_grad_(False)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(),
                          nn.Linear(4 * width, width))
            for _ in range(depth)
        )  # fmt: skip
        self.unused = nn.Linear(width, width)
        self.register_buffer("scale", torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        """The mean square of what comes out."""
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x) * self.scale
        return x.square().mean()


class Mixed(Blocks):
    """The same in bfloat16 where autocast says so."""

    def forward(self, x: Tensor) -> Tensor:
        """The mean square of what comes out."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x).float()


def peak_above(run: Callable[[], object]) -> int:
    """The most bytes above what was allocated before, by the profiler."""
    with quiet_collector(), profiled() as session, record_function(_SPAN):
        run()
    level = highest = 0
    for event in read_recording(session, CPU, _SPAN.__eq__).allocations:
        level += event.nbytes
        highest = max(highest, level)
    return highest


def standing(model: nn.Module, args: Iterable[Any]) -> int:
    """Bytes of parameters, buffers and inputs."""
    held = [*model.parameters(), *model.buffers(), *(a for a in args if isinstance(a, Tensor))]
    found = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held}
    return sum(found.values())


def train(step: Callable[[], Tensor], model: nn.Module, job: Job, steps: int = 3) -> None:
    """Some steps of a job."""
    scaler = job.scaler
    for _ in range(steps):
        for _ in range(job.accumulate):
            loss = step()
            (loss if scaler is None else scaler.scale(loss)).backward()
        if job.clip_norm is not None:
            for optimizer in job.optimizers:
                if scaler is not None:
                    scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), job.clip_norm)
        for optimizer in job.optimizers:
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
        for optimizer in job.optimizers:
            optimizer.zero_grad(set_to_none=job.set_to_none)


def job_peak(step: Callable[[], Tensor], model: nn.Module, args: Iterable[Any], job: Job) -> int:
    """The peak of three steps of a job, with what stands there."""
    return standing(model, args) + peak_above(lambda: train(step, model, job))
