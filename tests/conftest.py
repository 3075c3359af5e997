"""What every test starts from: known threads, a fixed seed, no compiled leftovers."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

SEED = 0


@pytest.fixture(scope="session", autouse=True)
def _session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Use two threads, and caches of this session's own: no hits from other runs."""
    # Test processes side by side share the cores: one thread each.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("inductor")
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
        patch.setenv("CKPT_PASS_CACHE", str(tmp_path_factory.mktemp("kernels")))
        yield


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """Seed every generator; afterwards drop what Dynamo compiled, if the test loaded it at all."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
