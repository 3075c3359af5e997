"""The door to the states of random numbers that code under ours reads, and keeps."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch


@contextlib.contextmanager
def told_of_states(told: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Inside, be told of each state of the CPU's random numbers that this thread reads.

    No mode sees such tensors. ``torch.utils.checkpoint`` keeps one for each region until that has
    run again, and ``torch.random.fork_rng`` one as long as it lasts; both ask
    ``torch.get_rng_state``, which is another function meanwhile.
    """
    read, thread = torch.random.get_rng_state, threading.get_ident()

    def get_rng_state() -> torch.Tensor:
        state = read()
        if threading.get_ident() == thread:
            told(state)
        return state

    torch.get_rng_state = torch.random.get_rng_state = get_rng_state
    try:
        yield
    finally:
        torch.get_rng_state = torch.random.get_rng_state = read
