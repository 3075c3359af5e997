"""Process groups that several files of tests have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.distributed.ranks import simulated


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """A process group of two, of which this process is the first."""
    with simulated(2):
        yield


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    method = f"file://{tmp_path}/group"
    dist.init_process_group("gloo", init_method=method, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
