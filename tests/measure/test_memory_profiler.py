"""Memory of a block in normalised units: 512 x 512 float32 is 1 MiB."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass
from ckpt_pass.measure.memory_profiler import MemoryProfiler
from tests.cli.test_cli import check_png

MIB = 2**20


def matrix() -> Tensor:
    return torch.randn(512, 512)


def test_peak_and_what_is_held() -> None:
    with MemoryProfiler() as memory:
        first, second = matrix(), matrix()
        del first
        third = matrix()
    assert memory.peak_bytes == 2 * MIB  # two of the three at any time
    assert memory.record.held_bytes == 2 * MIB
    assert [n // MIB for _, n in memory.timeline] == [0, 1, 2, 1, 2]
    moments = [moment for moment, _ in memory.timeline]
    assert moments == sorted(moments) and moments[-1] <= memory.record.duration_s
    assert second.shape == third.shape


def test_what_was_there_before_may_go() -> None:
    """A block that only frees has no peak; torch may not know the size of what was there before."""
    held = [matrix()]
    with MemoryProfiler() as memory:
        held.clear()
    assert memory.peak_bytes == 0
    assert memory.record.held_bytes in (0, -MIB)


def test_a_training_step_as_measure_step_sees_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU())
    x = matrix()
    measured = ckpt_pass.measure_step(lambda: model(x).sum(), repeats=1)
    with MemoryProfiler() as memory:
        with memory.phase("forward"):
            loss = model(x).sum()
        with memory.phase("backward"):
            loss.backward()
        del loss
    assert memory.peak_bytes == measured.peak_bytes
    forward, backward = memory.record.phases
    assert (forward.name, backward.name) == ("forward", "backward")
    assert max(forward.peak_bytes, backward.peak_bytes) == memory.peak_bytes
    assert forward.end_s <= backward.begin_s <= memory.record.duration_s
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert memory.record.held_bytes == gradients
    assert "forward" in str(memory.record) and f"{memory.peak_bytes / 1e6:.2f} MB" in str(
        memory.record
    )


def test_a_profiler_is_used_again() -> None:
    memory = MemoryProfiler("cpu")
    for count in (1, 3):
        with memory:
            held = [matrix() for _ in range(count)]
        assert memory.peak_bytes == count * MIB
        del held


def test_a_picture(tmp_path: Path) -> None:
    with MemoryProfiler() as memory, memory.phase("only"):
        held = [matrix() for _ in range(4)]
    check_png(memory.plot(tmp_path / "memory.png"))
    assert len(held) == 4


def test_nothing_recorded() -> None:
    memory = MemoryProfiler()
    with pytest.raises(ckpt_pass.NothingRecordedError, match="Nothing is recorded yet"):
        _ = memory.peak_bytes
    with pytest.raises(LookupError), memory:
        raise LookupError
    with pytest.raises(ckpt_pass.NothingRecordedError):
        _ = memory.timeline
    with memory:  # and it still works
        matrix()
    assert memory.peak_bytes == MIB


def test_wrong_uses() -> None:
    with MemoryProfiler("cpu") as memory, pytest.raises(ckpt_pass.ProfilerInUseError):
        memory.__enter__()
    with pytest.raises(ckpt_pass.SnapshotError, match="CUDA's allocator"):
        MemoryProfiler("cpu", snapshot="snapshot.pickle")


@pytest.mark.gpu
def test_on_an_accelerator(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot.pickle"
    with MemoryProfiler("cuda", snapshot=snapshot) as memory:
        held = torch.randn(512, 512, device="cuda")
    assert memory.peak_bytes >= MIB and memory.record.held_bytes >= MIB
    assert snapshot.stat().st_size > 0 and held.is_cuda
