"""What every test starts from: known threads, a fixed seed, no compiled leftovers."""

from __future__ import annotations

import gc
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
    side_by_side = "PYTEST_XDIST_WORKER" in os.environ
    # Test processes side by side share the cores, one thread each, and the caches: every one would
    # compile inductor's headers, and measure the same kernels.
    torch.set_num_threads(1 if side_by_side else 2)
    base = tmp_path_factory.getbasetemp()
    caches = base.parent if side_by_side else base
    with pytest.MonkeyPatch.context() as patch:
        for variable, name in (
            ("TORCHINDUCTOR_CACHE_DIR", "inductor"),
            ("CKPT_PASS_CACHE", "kernels"),
        ):
            (caches / name).mkdir(exist_ok=True)
            patch.setenv(variable, str(caches / name))
        gc.freeze()
        yield


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """Seed every generator; afterwards drop what Dynamo compiled, if the test loaded it at all.

    What is alive then (modules, above all) is taken from the collector: a collection goes through
    half a million objects otherwise, 0.35 s, and every step that is measured begins with one.
    """
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    gc.freeze()
